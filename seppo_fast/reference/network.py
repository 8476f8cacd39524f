"""The network beside the policy, in which past policies are loaded one after another, to draw samples and to be compared with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seppo_fast.reference.blocks import offloads_blocks
from seppo_fast.reference.pool import Pool
from seppo_fast.reference.sampler import Sampler


@dataclass
class Reference:
    """A network of the policy's architecture, which holds past policy `index` and draws `batch_size` samples at once.

    `sampler` draws rollouts, and `shown` the samples of grids and evaluations: the same one, unless these are drawn otherwise.
    `pool` stays empty where the method has no reference: then the network only shows the present policy. `offloaded`: it is in host
    memory except within `on_device` and `holding`; a network that offloads its blocks always is. `fixed` holds another model, which
    is the reference in place of the pool's initial policy.
    """

    sampler: Sampler
    shown: Sampler
    batch_size: int
    pool: Pool
    offloaded: bool
    fixed: Pool | None = None
    index: int | None = None

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.sampler.module

    def take(self, index: int) -> None:
        """Load a past policy."""
        self.index = index
        self.restore()

    def prefetch(self, index: int) -> None:
        """Begin to read what `take` will load."""
        (self.fixed or self.pool).prefetch(index)

    @contextmanager
    def drawing(self, index: int | None) -> Iterator[None]:
        """The network on the device, holding past policy `index` where one is given, and what it held again afterwards."""
        with self.on_device():
            if index is None or (index == self.index and self.fixed is None):
                yield
            else:
                self.pool.load_into(index, self.module)
                yield
                self.restore()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The network on the sampler's device, and offloaded afterwards."""
        if not offloads_blocks(self.module):
            self.module.to(self.sampler.device)
        yield
        self.offload()

    def offload(self) -> None:
        """Move the network to host memory, where that is its place."""
        if self.offloaded:
            self.sampler.release()
            self.module.to("cpu")

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The network on the device with other weights by name; afterwards it holds its past policy again."""
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
        with self.on_device():
            yield
        self.restore()

    def restore(self) -> None:
        """Load again what was taken last."""
        if self.index is not None:
            (self.fixed or self.pool).load_into(self.index, self.module)
