"""Stable Diffusion 1.x and 2.x: one text encoder, its last hidden state."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import Tensor, nn
from transformers import CLIPTextModel

from seppo_fast.models import common
from seppo_fast.models.contract import HALF, Adapt, Conditions, UNet, unchanged
from seppo_fast.models.directory import Components, Directory
from seppo_fast.models.pix2pix import has_image_condition, network_input


class StableDiffusion:
    """A Stable Diffusion pipeline directory. Conditions: `prompt_embeds` (B, 77, D).

    With an `image_condition` also `image_latents` (B, C, h, w), unscaled: then it is, or will be, an InstructPix2Pix pipeline.
    """

    name = "sd"
    video = False
    denoiser = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    components: Components = {
        "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",), "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"), "scheduler": (),
    }
    lora_loader: Any = StableDiffusionLoraLoaderMixin
    embeds_guidance, guidance = False, True
    half = HALF

    def __init__(self, directory: Directory) -> None:
        common.check_schedule(directory)
        width = directory.configs["text_encoder"].get("hidden_size", 512)
        common.check_unet(directory, width, addition=None)
        self.prompt_tokens = {"text_encoder": common.check_vocabulary(directory, "text_encoder")}
        self.directory = directory
        self.path: Path = directory.path
        self.scheduler_config: dict[str, Any] = directory.configs["scheduler"]
        self.prediction_type: str = self.scheduler_config.get("prediction_type", "epsilon")
        self.num_train_timesteps = len(common.alphas_cumprod(self.scheduler_config))
        self.image_condition = has_image_condition(directory)
        self.latent_channels, self.vae_scale_factor, self.latent_scale = common.vae_facts(directory)
        self.multiple = self.vae_scale_factor
        self.sample_size: Any = directory.configs["unet"].get("sample_size")
        self.condition_shapes = {"prompt_embeds": (self.prompt_tokens["text_encoder"], width)}

    def load_denoiser(self, dtype: torch.dtype) -> UNet:
        """A fresh UNet from disk, on the CPU."""
        return common.load_unet(self.directory, dtype)

    def empty_denoiser(self) -> UNet:
        """The network without weights, made under the caller's device."""
        return common.empty_unet(self.directory)

    def empty_vae(self) -> AutoencoderKL:
        """The VAE without weights, made under the caller's device."""
        return common.empty_vae(self.directory)

    def load_vae(self, device: torch.device | str) -> AutoencoderKL:
        """The VAE in fp32, for inference."""
        return common.load_vae(self.directory, device)

    def load_text(
        self, device: torch.device | str, dtype: torch.dtype = torch.float32, adapt: Adapt = unchanged
    ) -> Callable[[list[str]], Conditions]:
        """Prompts -> conditions on `device`, as `StableDiffusionPipeline.encode_prompt` makes them; `adapt` changes the encoder."""
        tokenizer = common.load_tokenizer(self.directory, "tokenizer")
        encoder = common.load_component(self.directory, "text_encoder", CLIPTextModel, dtype)
        adapt("text_encoder", encoder)
        encoder = encoder.to(device).eval().requires_grad_(False)

        @torch.no_grad()
        def embed(prompts: list[str]) -> Conditions:
            tokens = common.token_ids(tokenizer, encoder.config, prompts)
            masked = getattr(encoder.config, "use_attention_mask", False)
            mask = tokens["attention_mask"].to(device) if masked else None
            states = encoder(tokens["input_ids"].to(device), attention_mask=mask)
            return {"prompt_embeds": states.last_hidden_state}

        return embed

    def encode(self, vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] -> posterior mean and standard deviation, (B, C, h, w) fp32, not scaled."""
        return common.encode(vae, pixels)

    def decode(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W) fp32 in [0, 1]."""
        return common.decode(vae, latents)

    def denoise(self, unet: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's output (B, C, h, w) for latents (B, C, h, w) at timesteps (B,)."""
        return unet(network_input(latents, conditions), timesteps, encoder_hidden_states=conditions["prompt_embeds"],
                    return_dict=False)[0]

    def set_timesteps(self, scheduler: Any, steps: int, latents: Sequence[int]) -> None:
        """Set a diffusers scheduler to `steps`, as the pipeline does."""
        scheduler.set_timesteps(steps)

    def time_shift(self, latents: Sequence[int]) -> float:
        """No shift of times: DDPM-like schedules have their own."""
        return 1.0

    def check_side(self, side: int) -> None:
        """The UNet takes images of any size."""

    def fingerprint_files(self) -> list[Path]:
        """The files whose content decides cached latents and embeddings."""
        return common.encoding_files(self.directory)
