"""The denoising loop: one step that reads and writes fixed storage, so that it can be run as it is or captured."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seppo_fast.reference.solver import SolverTable

Conditions = dict[str, Tensor]
Denoise = Callable[[Tensor, Tensor, Conditions], Tensor]


@dataclass(frozen=True)
class Loop:
    """Batches of B samples of one shape. No address changes from step to step or batch to batch, and no value is read.

    `denoise(latents, timesteps, conditions)` sees `dtype`; the weighted sums are fp32. Guidance
    (`u + guidance_scale * (c - u)`) runs both in one doubled batch, unconditional first, and not at all at scale 1.
    """

    denoise: Denoise
    table: SolverTable
    guidance_scale: float
    dtype: torch.dtype
    known: Tensor  # (S + 1, B, C, h, w) fp32: the noise, then each output
    conditions: Conditions  # (B, ...), or (2B, ...) with guidance
    number: Tensor  # (1,) long: the step that is next

    def start(self, noise: Tensor, conditions: Conditions) -> None:
        """Begin anew from `noise` (B, C, h, w), one N(0, I) a sample, under `conditions` (B, ...)."""
        self.number.zero_()
        self.known.zero_()  # each sum runs over all terms, and 0 * a NaN of the batch before would be NaN
        self.known[0].copy_(noise, non_blocking=True)
        for name, value in conditions.items():
            self.conditions[name][-len(value):].copy_(value, non_blocking=True)

    def step(self) -> None:
        """The network's next call."""
        latents = _weighted_sum(self.table.inputs.index_select(0, self.number)[0], self.known)
        timestep = self.table.timesteps.index_select(0, self.number)
        self.number.add_(1)
        self.known.index_copy_(0, self.number, self._predict(latents, timestep)[None])

    def result(self) -> Tensor:
        """`(B, C, h, w)` fp32 after the last step, in storage of its own."""
        return _weighted_sum(self.table.outputs[-1], self.known)

    def _predict(self, latents: Tensor, timestep: Tensor) -> Tensor:
        if self.guidance_scale == 1:
            return self.denoise(latents.to(self.dtype), timestep.expand(len(latents)), self.conditions).float()
        twice = torch.cat([latents, latents]).to(self.dtype)
        without, given = self.denoise(twice, timestep.expand(len(twice)), self.conditions).float().chunk(2)
        return without + self.guidance_scale * (given - without)


def open_loop(denoise: Denoise, table: SolverTable, batch: tuple[int, ...], unconditional: Conditions, guidance_scale: float,
              dtype: torch.dtype) -> Loop:
    """A loop for batches of shape `(B, C, h, w)` on the table's device; `unconditional` has batch 1."""
    device, size = table.inputs.device, batch[0]
    conditions = {}
    for name, value in unconditional.items():
        rows = size if guidance_scale == 1 else 2 * size
        conditions[name] = value.to(device, dtype).expand(rows, *value.shape[1:]).contiguous()
    known = torch.empty(len(table.inputs) + 1, *batch, dtype=torch.float32, device=device)
    return Loop(denoise, table, guidance_scale, dtype, known, conditions, torch.zeros(1, dtype=torch.long, device=device))


@torch.no_grad()
def sample(denoise: Denoise, table: SolverTable, noise: Tensor, conditions: Conditions, unconditional: Conditions,
           guidance_scale: float, dtype: torch.dtype, before_step: Callable[[], None] = lambda: None) -> Tensor:
    """Latents `(B, C, h, w)` fp32 that the solver in `table` makes of `noise` `(B, C, h, w)`: the loop as it is.

    `conditions` have batch B and `unconditional` batch 1; `table` is on the device of `noise`. `before_step` may raise to
    give up.
    """
    loop = open_loop(denoise, table, tuple(noise.shape), unconditional, guidance_scale, dtype)
    return run(loop, loop.step, noise, conditions, before_step)


def run(loop: Loop, step: Callable[[], object], noise: Tensor, conditions: Conditions, before_step: Callable[[], None]) -> Tensor:
    """One batch through the loop, each step made by `step`."""
    if conditions.keys() != loop.conditions.keys():
        raise ValueError(f"conditions are {sorted(conditions)}, the unconditional ones {sorted(loop.conditions)}")
    loop.start(noise, conditions)
    for _ in range(len(loop.table.inputs)):
        before_step()
        step()
    return loop.result()


def _weighted_sum(weights: Tensor, terms: Tensor) -> Tensor:
    """Sum of `weights[i] * terms[i]`. Not a matrix product: TF32 or autocast would round the weights."""
    return (weights.view(-1, *[1] * (terms.dim() - 1)) * terms).sum(0)
