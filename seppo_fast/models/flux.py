"""FLUX.1: a CLIP text encoder's pooled embedding, T5, a transformer on packed latents, the guidance scale as an input."""

from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.loaders import FluxLoraLoaderMixin
from torch import Tensor, nn

from seppo_fast.models import common
from seppo_fast.models.contract import Conditions
from seppo_fast.models.directory import Components, Directory
from seppo_fast.models.flows import CLIP, T5, FlowTransformer, check_transformer

T5_TOKENS = 512  # as `FluxPipeline` calls it by default; fewer where tokenizer_2 says so


class Flux(FlowTransformer):
    """A FLUX.1 directory. Conditions: `prompt_embeds` (B, 512, D) of T5 and `pooled` (B, P) of CLIP.

    The published models are distilled from guided ones: FLUX.1-dev `embeds_guidance`, FLUX.1-schnell knows none.
    """

    name = "flux"
    components: Components = {
        "transformer": ("FluxTransformer2DModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("T5EncoderModel",), "tokenizer": CLIP, "tokenizer_2": T5, "scheduler": (),
    }
    lora_loader: Any = FluxLoraLoaderMixin
    pipeline = FluxPipeline
    guidance = False
    patch = 2
    sample_size = 128  # `FluxPipeline.default_sample_size`

    def __init__(self, directory: Directory) -> None:
        super().__init__(directory)
        config = directory.configs["transformer"]
        first, second = (self.text_config(part) for part in ("text_encoder", "text_encoder_2"))
        channels, why = 4 * self.latent_channels, "the VAE, of which four latents are packed into one token,"
        check_transformer(directory, self._kind, {
            "in_channels": (channels, why), "out_channels": (config.get("out_channels") and channels, why),
            "patch_size": (1, "packing"), "joint_attention_dim": (second.d_model, "text_encoder_2"),
            "pooled_projection_dim": (first.hidden_size, "text_encoder"),
        })
        self.prompt_tokens = {"text_encoder": common.check_vocabulary(directory, "text_encoder", pooled=True),
                              "text_encoder_2": common.check_vocabulary(directory, "text_encoder_2", most=T5_TOKENS)}
        self.embeds_guidance = bool(config.get("guidance_embeds", False))
        self.condition_shapes = {"prompt_embeds": (self.prompt_tokens["text_encoder_2"], second.d_model),
                                 "pooled": (first.hidden_size,)}

    def embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> Conditions:
        """The conditions of prompts, by the pipeline's `encode_prompt`."""
        embeds, pooled, _ = pipeline.encode_prompt(prompts, None, device=device,
                                                   max_sequence_length=self.prompt_tokens["text_encoder_2"])
        return {"prompt_embeds": embeds, "pooled": pooled}

    def denoise(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions, guidance: float = 1.0
                ) -> Tensor:
        """The network's output (B, C, h, w) for latents (B, C, h, w) at timesteps (B,), 0 to 1000."""
        size, (height, width) = len(latents), (side // self.patch for side in latents.shape[-2:])
        embeds = conditions["prompt_embeds"]
        scale = torch.full((size,), guidance, device=latents.device) if self.embeds_guidance else None
        packed = FluxPipeline._pack_latents(latents, size, self.latent_channels, *latents.shape[-2:])
        output = denoiser(
            hidden_states=packed, timestep=timesteps / 1000, guidance=scale, pooled_projections=conditions["pooled"],
            encoder_hidden_states=embeds, txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device),
            img_ids=places(height, width, latents.device), return_dict=False)[0]
        return FluxPipeline._unpack_latents(output, *(side * self.vae_scale_factor for side in latents.shape[-2:]),
                                            self.vae_scale_factor)


def places(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 3): zero, row and column of each token, made on the device: a CUDA graph cannot copy from the host."""
    ids = torch.zeros(height, width, 3, device=device)
    ids[..., 1] += torch.arange(height, device=device)[:, None]
    ids[..., 2] += torch.arange(width, device=device)
    return ids.flatten(0, 1)
