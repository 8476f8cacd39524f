"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, a transformer on patches, flow matching."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders import SD3LoraLoaderMixin
from torch import Tensor, nn

from seppo_fast.errors import UserError
from seppo_fast.models import common
from seppo_fast.models.contract import Conditions
from seppo_fast.models.directory import NONE, Components, Directory
from seppo_fast.models.flows import CLIP, T5, FlowTransformer, check_transformer

T5_TOKENS = 256  # as `StableDiffusion3Pipeline` calls it by default; fewer where tokenizer_3 says so


class StableDiffusion3(FlowTransformer):
    """A Stable Diffusion 3 directory. Conditions: `prompt_embeds` (B, 77 + 256, D), CLIP's before T5's, and `pooled` (B, P).

    Where T5 is left out (null in model_index.json), its embeddings are zeros, as in the pipeline.
    """

    name = "sd3"
    components: Components = {
        "transformer": ("SD3Transformer2DModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",), "text_encoder_3": ("T5EncoderModel", NONE),
        "tokenizer": CLIP, "tokenizer_2": CLIP, "tokenizer_3": (*T5, NONE), "scheduler": (),
    }
    lora_loader: Any = SD3LoraLoaderMixin
    pipeline = StableDiffusion3Pipeline
    guidance = True

    def __init__(self, directory: Directory) -> None:
        config = directory.configs["transformer"]
        self.patch: int = config.get("patch_size", 2)
        super().__init__(directory)
        first, second = (self.text_config(part) for part in ("text_encoder", "text_encoder_2"))
        width, pooled = config.get("joint_attention_dim", 4096), first.projection_dim + second.projection_dim
        channels = (self.latent_channels, "the VAE")
        expected = {"in_channels": channels, "out_channels": channels,
                    "pooled_projection_dim": (pooled, "the sum of the text encoders' projection_dim")}
        for part in ("text_encoder", "text_encoder_2"):
            self.prompt_tokens[part] = common.check_vocabulary(directory, part, pooled=True)
        common.check_lengths(directory, self.prompt_tokens)
        check_third(directory)
        if "text_encoder_3" in directory.configs:
            expected["joint_attention_dim"] = (self.text_config("text_encoder_3").d_model, "text_encoder_3")
            self.prompt_tokens["text_encoder_3"] = common.check_vocabulary(directory, "text_encoder_3", most=T5_TOKENS)
        check_transformer(directory, self._kind, expected)
        if first.hidden_size + second.hidden_size > width:
            raise UserError(f"{self.path / 'transformer' / 'config.json'}: joint_attention_dim is {width}, which is less than the"
                            f" CLIP text encoders are wide together ({first.hidden_size} + {second.hidden_size})")
        self.sample_size: Any = config.get("sample_size", 128)
        self.t5_tokens = self.prompt_tokens.get("text_encoder_3", T5_TOKENS)
        self.condition_shapes = {"prompt_embeds": (self.prompt_tokens["text_encoder"] + self.t5_tokens, width), "pooled": (pooled,)}

    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditions:
        """The conditions of prompts, by the pipeline's `encode_prompt`."""
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False,
                                                      max_sequence_length=self.t5_tokens)
        return {"prompt_embeds": embeds, "pooled": pooled}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's output (B, C, h, w) for latents (B, C, h, w) at timesteps (B,), 0 to 1000."""
        return denoiser(hidden_states=latents, timestep=timesteps, encoder_hidden_states=conditions["prompt_embeds"],
                        pooled_projections=conditions["pooled"], return_dict=False)[0]

    def set_timesteps(self, scheduler: Any, steps: int, latents: Sequence[int]) -> None:
        """As the pipeline does: its static shift is applied a second time by the scheduler."""
        dynamic = scheduler.config.get("use_dynamic_shifting")
        scheduler.set_timesteps(steps, **({"mu": self.shift_of(latents)} if dynamic else {}))

    def check_side(self, side: int) -> None:
        """`UserError` where images of `side` pixels have more patches than the transformer has positions."""
        most = self.directory.configs["transformer"].get("pos_embed_max_size", 96) * self.multiple
        if side > most:
            raise UserError(f"{self.path}: images of {side} pixels are larger than its transformer can place: at most {most}"
                            " (pos_embed_max_size)")


def check_third(directory: Directory) -> None:
    """Refuse T5 without its tokenizer, and a tokenizer without T5."""
    given = [directory.index.get(part) for part in ("text_encoder_3", "tokenizer_3")]
    if len({isinstance(value, list) and value[1] is not None for value in given}) > 1:
        raise UserError(f"{directory.path / 'model_index.json'}: text_encoder_3 is {given[0]!r} and tokenizer_3 is {given[1]!r}: a"
                        " model has both, or neither (null). Fetch the whole model again.")
