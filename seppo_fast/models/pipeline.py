"""What families share: the VAE and the files of a pipeline's directory, and the UNets of DDPM-like schedules."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from seppo_fast.models import common
from seppo_fast.models.contract import AT_ONCE, HALF, UNet, Vae
from seppo_fast.models.directory import Components, Directory, kind_of
from seppo_fast.models.latents import LatentScale
from seppo_fast.models.pix2pix import has_image_condition
from seppo_fast.models.vae_memory import PLAIN


class Pipeline:
    """A pipeline's directory whose VAE is one of images."""

    components: ClassVar[Components]
    video = False
    usual_frames, frame_rate = 16, 8
    rescale_guidance: Callable[[Tensor, Tensor], Tensor] | None = None
    vae_memory = PLAIN

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.path: Path = directory.path
        self.latent_channels, self.vae_scale_factor, self.latent_scale = self.vae_facts()

    def vae_facts(self) -> tuple[int, int, LatentScale]:
        """Latent channels, pixels per latent along a side, and how latents are scaled."""
        return common.vae_facts(self.directory)

    def latent_shape(self, side: int, frames: int) -> tuple[int, ...]:
        """(C, h, w) of an image of `side` pixels."""
        return (self.latent_channels, *[side // self.vae_scale_factor] * 2)

    def check_frames(self, frames: int) -> None:
        """Images have none."""

    def load_vae(self, device: torch.device | str) -> Vae:
        """The VAE in fp32, for inference."""
        return self.vae_memory.set_up(common.load_vae(self.directory, self.vae_kind, device))

    def empty_vae(self) -> Vae:
        """The VAE without weights, made under the caller's device."""
        return self.vae_memory.set_up(self.vae_kind.from_config(dict(self.directory.configs["vae"])))

    @property
    def vae_kind(self) -> Any:
        """The VAE's class."""
        return kind_of(type(self).components["vae"][0])

    def encode(self, vae: Vae, pixels: Tensor, at_once: int = AT_ONCE) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] -> posterior mean and standard deviation, (B, C, h, w) fp32, not scaled."""
        parts = [common.encode(vae, some) for some in pixels.split(at_once)]
        mean, std = (torch.cat(values) for values in zip(*parts, strict=True))
        return mean, std

    def decode(self, vae: Vae, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W) fp32 in [0, 1]."""
        return common.decode(vae, latents, self.latent_scale)

    def fingerprint_files(self) -> list[Path]:
        """The files whose content decides cached latents and embeddings."""
        return common.encoding_files(self.directory)


class UNetPipeline(Pipeline):
    """A pipeline whose network is a UNet, trained on a DDPM-like noise schedule and guided by a second call without the prompt."""

    denoiser = "unet"
    embeds_guidance, guidance = False, True
    half = HALF

    def __init__(self, directory: Directory) -> None:
        super().__init__(directory)
        self.scheduler_config: dict[str, Any] = directory.configs["scheduler"]
        self.prediction_type: str = self.scheduler_config.get("prediction_type", "epsilon")
        self.num_train_timesteps = len(common.alphas_cumprod(self.scheduler_config))
        self.image_condition = has_image_condition(directory)
        self.multiple = self.vae_scale_factor
        self.sample_size: Any = directory.configs["unet"].get("sample_size")

    def load_denoiser(self, dtype: torch.dtype) -> UNet:
        """A fresh UNet from disk, on the CPU."""
        return common.load_unet(self.directory, dtype)

    def empty_denoiser(self) -> UNet:
        """The network without weights, made under the caller's device."""
        return common.empty_unet(self.directory)

    def set_timesteps(self, scheduler: Any, steps: int, latents: Sequence[int]) -> None:
        """Set a diffusers scheduler to `steps`, as the pipeline does."""
        scheduler.set_timesteps(steps)

    def time_shift(self, latents: Sequence[int]) -> float:
        """No shift of times: DDPM-like schedules have their own."""
        return 1.0

    def check_side(self, side: int) -> None:
        """The UNet takes images of any size."""
