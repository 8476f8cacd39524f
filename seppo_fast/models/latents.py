"""How a model's latents are scaled for its network."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LatentScale:
    """The network sees `(z - shift) * factor` of what the VAE makes."""

    factor: float
    shift: float = 0.0

    def scaled(self, latents: Tensor) -> Tensor:
        """What the network sees of the VAE's latents."""
        return (latents - self.shift) * self.factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """The VAE's latents of what the network sees."""
        return latents / self.factor + self.shift
