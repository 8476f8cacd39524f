"""Qwen-Image: Qwen2.5-VL's states of a prompt in a template, a transformer on packed latents, a VAE that takes one-frame videos."""

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from diffusers.loaders import QwenImageLoraLoaderMixin
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from seppo_fast.errors import UserError
from seppo_fast.models import common
from seppo_fast.models.contract import AT_ONCE, Conditions, Vae
from seppo_fast.models.directory import Components, Directory
from seppo_fast.models.flows import FlowTransformer, check_transformer, per_channel
from seppo_fast.models.latents import LatentScale
from seppo_fast.models.values import ADVICE, check_values

TOKENS = 512  # as `QwenImagePipeline` calls it by default; fewer where the tokenizer says so
POSITIONS = 4096  # that the transformer has in each direction; a prompt's lie behind half of the image's longer side
# Keys of the transformer's configuration that are false in a text-to-image model.
OTHERS = {
    "guidance_embeds": "a distilled model whose guidance scale is an input, which diffusers cannot run",
    "zero_cond_t": "a Qwen-Image-Edit model, which is given an image",
    "use_additional_t_cond": "a Qwen-Image-Layered model, which takes an image apart",
    "use_layer3d_rope": "a Qwen-Image-Layered model, which takes an image apart",
}


class QwenImage(FlowTransformer):
    """A Qwen-Image directory. Conditions: `prompt_embeds` (B, 512, D), zeros after the prompt's end, and `mask` (B, 512), 1 before it.

    The pipeline pads prompts to the longest of them; the mask makes any length the same.
    """

    name = "qwen-image"
    components: Components = {
        "transformer": ("QwenImageTransformer2DModel",), "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",), "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        "scheduler": (),
    }
    lora_loader: Any = QwenImageLoraLoaderMixin
    pipeline = QwenImagePipeline
    guidance = True
    patch = 2
    sample_size = 128  # `QwenImagePipeline.default_sample_size`

    def __init__(self, directory: Directory) -> None:
        check_kind(directory)
        super().__init__(directory)
        channels, why = 4 * self.latent_channels, "the VAE, of which four latents are packed into one token,"
        text = self.text_config("text_encoder").get_text_config()
        check_transformer(directory, self._kind, {
            "patch_size": (self.patch, "packing"), "in_channels": (channels, why), "out_channels": (self.latent_channels, "the VAE"),
            "joint_attention_dim": (text.hidden_size, "text_encoder"),
        })
        self.tokens = check_tokens(directory)
        self.prompt_tokens = {"text_encoder": self.tokens}
        self.condition_shapes = {"prompt_embeds": (self.tokens, text.hidden_size), "mask": (self.tokens,)}

    def vae_facts(self) -> tuple[int, int, LatentScale]:
        """Latent channels, pixels per latent along a side, and how latents are scaled."""
        config, file = self.directory.configs["vae"], self.path / "vae" / "config.json"
        halved, levels = config.get("temperal_downsample", (False, True, True)), len(config.get("dim_mult", (1, 2, 4, 4)))
        if len(halved) != levels - 1:
            raise UserError(f"{file}: temperal_downsample has {len(halved)} values, and dim_mult's {levels} levels need {levels - 1}:"
                            f" QwenImagePipeline takes the size of images from the former. {ADVICE}.")
        if (colours := config.get("input_channels", 3)) != 3:
            raise UserError(f"{file}: input_channels is {colours}, where 3 are needed: red, green and blue. The VAE of"
                            " Qwen-Image-Layered has 4; only models that draw from a prompt alone can be trained.")
        channels = config.get("z_dim", 16)
        return channels, 2 ** len(halved), per_channel(self.directory, self.vae_kind, channels)

    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditions:
        """The conditions of prompts, by the pipeline's `encode_prompt`."""
        embeds, mask = pipeline.encode_prompt(prompts, device=device, max_sequence_length=self.tokens)
        if mask is None:  # as the pipeline says that it is all ones
            mask = embeds.new_ones(embeds.shape[:2])
        missing = self.tokens - embeds.shape[1]
        return {"prompt_embeds": F.pad(embeds, (0, 0, 0, missing)), "mask": F.pad(mask.to(embeds.dtype), (0, missing))}

    def encode(self, vae: Vae, pixels: Tensor, at_once: int = AT_ONCE) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] -> posterior mean and standard deviation, (B, C, h, w) fp32, not scaled."""
        mean, std = super().encode(vae, pixels.unsqueeze(2), at_once)
        return mean.squeeze(2), std.squeeze(2)

    def decode(self, vae: Vae, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W) fp32 in [0, 1]."""
        return super().decode(vae, latents.unsqueeze(2)).squeeze(2)

    def denoise(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's output (B, C, h, w) for latents (B, C, h, w) at timesteps (B,), 0 to 1000."""
        height, width = latents.shape[-2:]
        output = denoiser(
            hidden_states=packed(latents), timestep=timesteps / 1000, encoder_hidden_states=conditions["prompt_embeds"],
            encoder_hidden_states_mask=conditions["mask"] > 0.5, img_shapes=[[(1, height // self.patch, width // self.patch)]],
            return_dict=False)[0]
        scale = self.vae_scale_factor
        return QwenImagePipeline._unpack_latents(output, height * scale, width * scale, scale).squeeze(2)

    def rescale_guidance(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """The guided output, each of its tokens as long as in the output with the prompt: (B, C, h, w) all."""
        size, _, height, width = guided.shape
        wanted, found = (packed(output).norm(dim=-1) for output in (conditional, guided))
        ratio = wanted / found.clamp_min(torch.finfo(found.dtype).tiny)  # a token of zeros stays one
        ratio = ratio.view(size, 1, height // self.patch, width // self.patch)
        return guided * ratio.repeat_interleave(self.patch, -1).repeat_interleave(self.patch, -2)

    def set_timesteps(self, scheduler: Any, steps: int, latents: Sequence[int]) -> None:
        """As the pipeline does: evenly from 1, with a shift by the number of tokens where the scheduler takes one.

        DPM-Solver++ takes no sigmas, and the pipeline no DPM-Solver++: it has its own steps.
        """
        takes = inspect.signature(scheduler.set_timesteps).parameters
        given = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if "sigmas" in takes else {"num_inference_steps": steps}
        mu = {"mu": self.shift_of(latents)} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(**given, **mu)
        scheduler.set_begin_index(0)

    def check_side(self, side: int) -> None:
        """`UserError` where images of `side` pixels leave the prompt no positions."""
        most = 2 * (POSITIONS - self.tokens) * self.multiple
        if side > most:
            raise UserError(f"{self.path}: images of {side} pixels are larger than its transformer can place: at most {most}")


def packed(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4C), the transformer's tokens."""
    return QwenImagePipeline._pack_latents(latents, *latents.shape)


def check_kind(directory: Directory) -> None:
    """Refuse transformers of other members of the family, and a text encoder whose nested values have other types."""
    file, text = directory.path / "transformer" / "config.json", directory.path / "text_encoder" / "config.json"
    for key, kind in OTHERS.items():
        if directory.configs["transformer"].get(key):
            raise UserError(f"{file}: {key} is set, as in {kind}; only models that draw from a prompt alone can be trained.")
    config = directory.configs["text_encoder"]
    check_values(text, config.get("text_config") or config, Qwen2_5_VLTextConfig)  # the published file has them at its top, too


@cache
def template() -> tuple[str, int]:
    """What the pipeline puts before a prompt, and how many tokens' states it drops for it."""
    pipeline = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)
    return pipeline.prompt_template_encode.split("{}")[0], pipeline.prompt_template_encode_start_idx


def check_tokens(directory: Directory) -> int:
    """How many tokens of a prompt the transformer sees. Refuses a tokenizer of another model."""
    if not directory.weights:  # a model whose shape alone is known
        return TOKENS
    before, dropped = template()
    seen = common.check_vocabulary(directory, "text_encoder", most=TOKENS + dropped)
    found, place = len(common.load_tokenizer(directory, "tokenizer")(before)["input_ids"]), directory.path / "tokenizer"
    if found != dropped:
        raise UserError(f"{place}: it makes {found} tokens of the words that QwenImagePipeline puts before a prompt, which are"
                        f" {dropped} in Qwen-Image's, so that the prompt's own would be dropped or the words' kept. {ADVICE}s.")
    if seen - dropped < 3:
        raise UserError(f"{place}: its model_max_length is {seen}, of which QwenImagePipeline's words before a prompt take {dropped}."
                        f" {ADVICE}s.")
    return min(TOKENS, seen - dropped)


def _without_lengths(hidden: Tensor, mask: Tensor | None) -> tuple[int, None, Tensor | None]:
    return hidden.shape[1], None, mask


# diffusers computes each prompt's length there, uses it nowhere, and copies a number from the host for it in every call: a CUDA
# graph cannot be captured with that.
transformer_qwenimage.compute_text_seq_len_from_mask = _without_lengths
