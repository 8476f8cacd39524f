"""A tiny random Qwen-Image pipeline on disk: what a `QwenImagePipeline` directory looks like."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from tiny import LATENTS, WORDS
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

MEAN, STD = (-0.7571, 0.1075, 0.5517, -0.1745), (2.8184, 1.4541, 0.8, 1.7708)  # of the latents' channels
TOKENS = 24  # of a prompt, behind the template's
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# Each is one token, as in the published tokenizer: the template's first part then has 34.
TEMPLATE = ("system", "user", "assistant", "Describe", *("Ġ" + word for word in (
    "the image by detailing color shape size texture quantity text spatial relationships of objects and background").split()))


def qwen_tokenizer(words: tuple[str, ...] = TEMPLATE, most: int = 34 + TOKENS) -> Qwen2Tokenizer:
    """A byte-level BPE: every byte, and the merges that make each of `words` and of WORDS one token."""
    tokens, merges = sorted(ByteLevel.alphabet()), []
    for word in (*words, *WORDS, *("Ġ" + word for word in WORDS)):
        prefix = word[0]
        for letter in word[1:]:
            if (prefix, letter) not in merges:
                merges.append((prefix, letter))
                tokens.append(prefix + letter)
            prefix += letter
    tokens += ["<|endoftext|>", *SPECIAL]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=most, eos_token="<|im_end|>",
                          additional_special_tokens=[*SPECIAL])


def text_encoder(tokens: Qwen2Tokenizer, width: int) -> Qwen2_5_VLForConditionalGeneration:
    """A causal language model of one layer, with the least vision tower that there is; no prompt has a picture."""
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokens), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
                         rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e6),
                         bos_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=1, out_hidden_size=width,
                           fullatt_block_indexes=[0]),
        image_token_id=tokens.convert_tokens_to_ids("<|image_pad|>"), video_token_id=tokens.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokens.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokens.convert_tokens_to_ids("<|vision_end|>")))


def qwen_vae(**overrides: Any) -> AutoencoderKLQwenImage:
    """Two levels, so that 16x16 pixels become 8x8 latents."""
    settings = dict(base_dim=8, z_dim=LATENTS[0], dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
                    latents_mean=[*MEAN], latents_std=[*STD])
    return AutoencoderKLQwenImage(**settings | overrides)


def tiny_qwen(folder: Path | str, seed: int = 0, scheduler: dict[str, Any] | None = None, **overrides: Any) -> Path:
    """A random `QwenImagePipeline` directory: 16x16 pixels, (4, 8, 8) latents, prompt embeds (24, 32), mask (24)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = qwen_tokenizer()
        settings = dict(patch_size=2, in_channels=4 * LATENTS[0], out_channels=LATENTS[0], num_layers=2, attention_head_dim=16,
                        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6))
        times = dict(shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
                     max_image_seq_len=8192, shift_terminal=0.02)
        pipeline = QwenImagePipeline(
            vae=qwen_vae(), text_encoder=text_encoder(tokens, 32), tokenizer=tokens,
            transformer=QwenImageTransformer2DModel(**settings | overrides),
            scheduler=FlowMatchEulerDiscreteScheduler(**times | (scheduler or {})),
        )
        pipeline.save_pretrained(folder)
    return Path(folder)
