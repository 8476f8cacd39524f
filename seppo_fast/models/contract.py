"""What a family of models offers the trainer, which knows no family; a new one is a class like this, and a line in families.py."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNetMotionModel
from torch import Tensor, nn

from seppo_fast.models.directory import Directory
from seppo_fast.models.latents import LatentScale
from seppo_fast.models.vae_memory import VaeMemory

Conditions = dict[str, Tensor]
Vae: TypeAlias = Any  # AutoencoderKL, or another family's
Adapt = Callable[[str, nn.Module], None]  # puts adapters on a component of this name
UNet = UNet2DConditionModel | UNetMotionModel
Denoiser: TypeAlias = ModelMixin  # a UNet, or a transformer
AT_ONCE = 16  # images, or frames, in the VAE
HALF = (torch.float16, torch.bfloat16)  # the half precisions, the preferred first


def unchanged(component: str, module: nn.Module) -> None:
    """A component as the directory has it."""


class Model(Protocol):
    """A pipeline's directory, checked; nothing is loaded yet. B samples have latents (B, C, h, w), of videos (B, C, F', h, w)."""

    name: ClassVar[str]
    video: ClassVar[bool]
    frame_rate: int  # frames a second at which its videos are shown
    denoiser: ClassVar[str]  # the component that is trained: "unet" or "transformer"
    text_encoders: tuple[str, ...]
    components: ClassVar[Mapping[str, tuple[str, ...]]]  # each with the classes it may have (empty: whichever)
    lora_loader: ClassVar[Any]  # the diffusers class that writes and reads LoRA files
    directory: Directory
    path: Path
    scheduler_config: dict[str, Any]
    num_train_timesteps: int
    prediction_type: str
    latent_channels: int
    vae_scale_factor: int  # pixels a latent, along a side
    latent_scale: LatentScale
    usual_frames: ClassVar[int]  # of a video, where nobody says how many
    multiple: int  # pixels: what sides must be a multiple of
    sample_size: Any  # latents along a side that the model was made for, as its configuration says
    prompt_tokens: Mapping[str, int]  # of a prompt that a text encoder sees
    condition_shapes: Mapping[str, tuple[int, ...]]  # of one prompt
    image_condition: bool
    embeds_guidance: bool  # the guidance scale is an input of the network
    guidance: bool  # the network is guided by a second call without the prompt
    # What the pipeline makes of (the guided output, the output with the prompt), (B, C, h, w) each; None: the guided output.
    rescale_guidance: Callable[[Tensor, Tensor], Tensor] | None
    vae_memory: VaeMemory  # of the VAEs that it makes
    half: ClassVar[tuple[torch.dtype, ...]]  # the half precisions in which its networks keep finite

    def load_denoiser(self, dtype: torch.dtype) -> Denoiser:
        """A fresh network from disk, on the CPU."""

    def empty_denoiser(self) -> Denoiser:
        """The network without weights, made under the caller's device."""

    def load_vae(self, device: torch.device | str) -> Vae:
        """The VAE in fp32, for inference."""

    def empty_vae(self) -> Vae:
        """The VAE without weights, made under the caller's device."""

    def load_text(self, device: torch.device | str, dtype: torch.dtype = torch.float32, adapt: Adapt = unchanged
                  ) -> Callable[[list[str]], Conditions]:
        """Prompts -> conditions on `device`, as the pipeline makes them; `adapt` changes text encoders."""

    def latent_shape(self, side: int, frames: int) -> tuple[int, ...]:
        """(C, h, w) of an image of `side` pixels, (C, F', h, w) of a video of so many frames."""

    def encode(self, vae: Vae, pixels: Tensor, at_once: int = AT_ONCE) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] -> posterior mean and standard deviation, (B, C, h, w) fp32, not scaled.

        Of videos (B, F, 3, H, W) -> (B, C, F', h, w). At most `at_once` images are in the VAE, or frames where it takes them alone.
        """

    def decode(self, vae: Vae, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W) fp32 in [0, 1]; of videos (B, F, 3, H, W)."""

    def denoise(self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's output, shaped as the latents, at timesteps (B,) as the pipeline's scheduler counts them.

        Where the model `embeds_guidance`, a keyword `guidance` gives the scale.
        """

    def set_timesteps(self, scheduler: Any, steps: int, latents: Sequence[int]) -> None:
        """Set a diffusers scheduler to `steps` for latents of a shape, as the pipeline does."""

    def time_shift(self, latents: Sequence[int]) -> float:
        """The k of s' = k s / (1 + (k - 1) s) by which a flow's times are shifted; 1.0 for DDPM-like schedules."""

    def check_side(self, side: int) -> None:
        """`UserError` where images of `side` pixels are too large for the model."""

    def check_frames(self, frames: int) -> None:
        """`UserError` where the model cannot make videos of so many frames."""

    def fingerprint_files(self) -> list[Path]:
        """The files whose content decides cached latents and embeddings."""
