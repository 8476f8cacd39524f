"""How a model's latents are scaled for its network."""

from dataclasses import dataclass

import torch
from torch import Tensor

PerChannel = float | tuple[float, ...]


@dataclass(frozen=True)
class LatentScale:
    """The network sees `(z - shift) * factor` of what the VAE makes, (B, C, ...); one number, or one a channel."""

    factor: PerChannel
    shift: PerChannel = 0.0

    def scaled(self, latents: Tensor) -> Tensor:
        """What the network sees of the VAE's latents."""
        return (latents - _along(self.shift, latents)) * _along(self.factor, latents)

    def unscaled(self, latents: Tensor) -> Tensor:
        """The VAE's latents of what the network sees."""
        return latents / _along(self.factor, latents) + _along(self.shift, latents)


def _along(values: PerChannel, latents: Tensor) -> Tensor | float:
    """The number, or the numbers as (C, 1, ...), on the device of latents (B, C, ...)."""
    if isinstance(values, float | int):
        return values
    return torch.tensor(values, device=latents.device).view(-1, *[1] * (latents.dim() - 2))
