"""The denoising loop: one step that reads and writes fixed storage, so that it can be run as it is or captured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seppo_fast.reference.calls import Call
from seppo_fast.reference.guidance import Guidance
from seppo_fast.reference.solver import SolverTable

Conditions = dict[str, Tensor]
Denoise = Callable[[Tensor, Tensor, Conditions], Tensor]


@dataclass(frozen=True)
class Loop:
    """Batches of B samples of one shape. No address changes from step to step or batch to batch, and no value is read.

    `denoise(latents, timesteps, conditions)` sees `dtype`; the weighted sums are fp32. The G branches of the guidance are
    predicted in one batch of G * B, a branch after the other; the last one has the prompt. `calls` says for each of the S steps
    which of them are predicted.
    """

    denoise: Denoise
    table: SolverTable
    guidance: Guidance
    calls: tuple[Call, ...]
    dtype: torch.dtype
    known: Tensor  # (1 + S + K, B, C, h, w) fp32: the noise, each output, and the K noises that the solver adds on its way
    conditions: Conditions  # (G * B, ...), each row as its branch has it
    number: Tensor  # (1,) long: the step that is next
    kept: Tensor | None  # (G - 1, B, C, h, w) fp32: the other branches as they were predicted last, where a step keeps them

    def start(self, noise: Tensor, conditions: Conditions, later: Sequence[Tensor] = ()) -> None:
        """Begin anew from `noise` (B, C, h, w), one N(0, I) a sample, under `conditions` (B, ...); `later`: the K other noises."""
        self.number.zero_()
        self.known.zero_()  # each sum runs over all terms, and 0 * a NaN of the batch before would be NaN
        self.known[0].copy_(noise, non_blocking=True)
        for place, value in zip(self.known[1 + len(self.calls):], later, strict=bool(later)):
            place.copy_(value, non_blocking=True)
        for name, value in conditions.items():
            for branch, rows in zip(self.guidance.branches, self.conditions[name].chunk(len(self.guidance)), strict=True):
                if name not in branch.empty:
                    rows.copy_(value, non_blocking=True)

    def step(self, call: Call = "all") -> None:
        """The network's next call."""
        latents = _weighted_sum(self.table.inputs.index_select(0, self.number)[0], self.known)
        timestep = self.table.timesteps.index_select(0, self.number)
        self.number.add_(1)
        self.known.index_copy_(0, self.number, self._predict(latents, timestep, call)[None])

    def result(self) -> Tensor:
        """`(B, C, h, w)` fp32 after the last step, in storage of its own."""
        return _weighted_sum(self.table.outputs[-1], self.known)

    def _predict(self, latents: Tensor, timestep: Tensor, call: Call) -> Tensor:
        size, branches = len(latents), len(self.guidance) if call == "all" else 1
        repeated = torch.cat([latents] * branches).to(self.dtype)
        conditions = {name: value[-branches * size:] for name, value in self.conditions.items()}
        outputs = self.denoise(repeated, timestep.expand(len(repeated)), conditions).float().chunk(branches)
        if call == "prompt":
            return outputs[0]
        if call == "kept" and self.kept is not None:
            return self.guidance.combined([*self.kept, *outputs])
        if self.kept is not None:
            self.kept.copy_(torch.stack(outputs[:-1]))
        return self.guidance.combined(outputs)


def open_loop(denoise: Denoise, table: SolverTable, batch: tuple[int, ...], empty: Conditions, guidance: Guidance,
              dtype: torch.dtype, calls: Sequence[Call] | None = None) -> Loop:
    """A loop for batches of shape `(B, C, h, w)` on the table's device; `empty`, of batch 1, is what branches leave empty.

    Without `calls` every step predicts all branches.
    """
    device, size = table.inputs.device, batch[0]
    calls = tuple(calls or ["all"] * len(table.inputs))
    conditions = {}
    for name, value in empty.items():
        # A copy, also of one row: prompts are written into it, and `empty` is the caller's.
        conditions[name] = value.to(device, dtype).repeat(len(guidance) * size, *[1] * (value.ndim - 1))
    known = torch.empty(table.inputs.shape[1], *batch, dtype=torch.float32, device=device)
    kept = torch.zeros(len(guidance) - 1, *batch, device=device) if "kept" in calls else None
    return Loop(denoise, table, guidance, calls, dtype, known, conditions, torch.zeros(1, dtype=torch.long, device=device), kept)


@torch.no_grad()
def sample(denoise: Denoise, table: SolverTable, noise: Tensor, conditions: Conditions, empty: Conditions,
           guidance: Guidance, dtype: torch.dtype, before_step: Callable[[], None] = lambda: None,
           calls: Sequence[Call] | None = None, later: Sequence[Tensor] = ()) -> Tensor:
    """Latents `(B, C, h, w)` fp32 that the solver in `table` makes of `noise` `(B, C, h, w)`: the loop as it is.

    `conditions` have batch B and `empty` batch 1; `table` is on the device of `noise`. `before_step` may raise to
    give up. `later`: the noises that the solver adds on its way, each as `noise`.
    """
    loop = open_loop(denoise, table, tuple(noise.shape), empty, guidance, dtype, calls)
    return run(loop, loop.step, noise, conditions, before_step, later)


def run(loop: Loop, step: Callable[[Call], object], noise: Tensor, conditions: Conditions, before_step: Callable[[], None],
        later: Sequence[Tensor] = ()) -> Tensor:
    """One batch through the loop, each step made by `step`."""
    if conditions.keys() != loop.conditions.keys():
        raise ValueError(f"conditions are {sorted(conditions)}, the unconditional ones {sorted(loop.conditions)}")
    if len(later) != loop.table.noises:
        raise ValueError(f"the solver adds {loop.table.noises} noises on its way, and was given {len(later)}")
    loop.start(noise, conditions, later)
    for call in loop.calls:
        before_step()
        step(call)
    return loop.result()


def _weighted_sum(weights: Tensor, terms: Tensor) -> Tensor:
    """Sum of `weights[i] * terms[i]`. Not a matrix product: TF32 or autocast would round the weights."""
    return (weights.view(-1, *[1] * (terms.dim() - 1)) * terms).sum(0)
