"""The denoising loop: one step that reads and writes fixed storage, so that it can be run as it is or captured."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seppo_fast.reference.guidance import Guidance
from seppo_fast.reference.solver import SolverTable

Conditions = dict[str, Tensor]
Denoise = Callable[[Tensor, Tensor, Conditions], Tensor]


@dataclass(frozen=True)
class Loop:
    """Batches of B samples of one shape. No address changes from step to step or batch to batch, and no value is read.

    `denoise(latents, timesteps, conditions)` sees `dtype`; the weighted sums are fp32. The G branches of the guidance are
    predicted in one batch of G * B, a branch after the other.
    """

    denoise: Denoise
    table: SolverTable
    guidance: Guidance
    dtype: torch.dtype
    known: Tensor  # (S + 1, B, C, h, w) fp32: the noise, then each output
    conditions: Conditions  # (G * B, ...), each row as its branch has it
    number: Tensor  # (1,) long: the step that is next

    def start(self, noise: Tensor, conditions: Conditions) -> None:
        """Begin anew from `noise` (B, C, h, w), one N(0, I) a sample, under `conditions` (B, ...)."""
        self.number.zero_()
        self.known.zero_()  # each sum runs over all terms, and 0 * a NaN of the batch before would be NaN
        self.known[0].copy_(noise, non_blocking=True)
        for name, value in conditions.items():
            for branch, rows in zip(self.guidance.branches, self.conditions[name].chunk(len(self.guidance)), strict=True):
                if name not in branch.empty:
                    rows.copy_(value, non_blocking=True)

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
        repeated = torch.cat([latents] * len(self.guidance)).to(self.dtype)
        outputs = self.denoise(repeated, timestep.expand(len(repeated)), self.conditions).float()
        return self.guidance.combined(outputs.chunk(len(self.guidance)))


def open_loop(denoise: Denoise, table: SolverTable, batch: tuple[int, ...], empty: Conditions, guidance: Guidance,
              dtype: torch.dtype) -> Loop:
    """A loop for batches of shape `(B, C, h, w)` on the table's device; `empty`, of batch 1, is what branches leave empty."""
    device, size = table.inputs.device, batch[0]
    conditions = {}
    for name, value in empty.items():
        # A copy, also of one row: prompts are written into it, and `empty` is the caller's.
        conditions[name] = value.to(device, dtype).repeat(len(guidance) * size, *[1] * (value.ndim - 1))
    known = torch.empty(len(table.inputs) + 1, *batch, dtype=torch.float32, device=device)
    return Loop(denoise, table, guidance, dtype, known, conditions, torch.zeros(1, dtype=torch.long, device=device))


@torch.no_grad()
def sample(denoise: Denoise, table: SolverTable, noise: Tensor, conditions: Conditions, empty: Conditions,
           guidance: Guidance, dtype: torch.dtype, before_step: Callable[[], None] = lambda: None) -> Tensor:
    """Latents `(B, C, h, w)` fp32 that the solver in `table` makes of `noise` `(B, C, h, w)`: the loop as it is.

    `conditions` have batch B and `empty` batch 1; `table` is on the device of `noise`. `before_step` may raise to
    give up.
    """
    loop = open_loop(denoise, table, tuple(noise.shape), empty, guidance, dtype)
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
