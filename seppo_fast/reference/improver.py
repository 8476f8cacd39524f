"""The improvement model, frozen: it makes winners of losers (Section 3.2, Eq. 9)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from seppo_fast.models import Conditions
from seppo_fast.models.latents import LatentScale
from seppo_fast.models.pix2pix import IMAGE
from seppo_fast.reference.sampler import Sampler


@dataclass(frozen=True)
class Improver:
    """`latent_scale` is the VAE's; `offloaded`: the network is in host memory except within `on_device`."""

    sampler: Sampler
    latent_scale: LatentScale
    offloaded: bool

    def improve(self, losers: Tensor, conditions: Conditions, noise: Tensor, before_step: Callable[[], None] = lambda: None
                ) -> Tensor:
        """Scaled latents (N, C, h, w) of winners, drawn from `noise`, of the losers' under the same prompts."""
        return self.sampler.draw(noise, conditions | {IMAGE: self.latent_scale.unscaled(losers)}, before_step)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The network on the sampler's device, and offloaded afterwards."""
        self.sampler.module.to(self.sampler.device)
        yield
        self.offload()

    def offload(self) -> None:
        """Move the network to host memory, where that is its place."""
        if self.offloaded:
            self.sampler.release()
            self.sampler.module.to("cpu")
