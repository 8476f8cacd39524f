"""Drawing latents from a denoising network: a loop that does not wait for the device, and that can be captured."""

from collections.abc import Callable

import torch
from torch import Tensor

from seppo_fast.reference.solver import SolverTable

Conditions = dict[str, Tensor]
Denoise = Callable[[Tensor, Tensor, Conditions], Tensor]


@torch.no_grad()
def sample(denoise: Denoise, table: SolverTable, noise: Tensor, conditions: Conditions, unconditional: Conditions,
           guidance_scale: float, dtype: torch.dtype, before_step: Callable[[], None] = lambda: None) -> Tensor:
    """Latents `(B, C, h, w)` fp32 that the solver in `table` makes of `noise` `(B, C, h, w)`, one N(0, I) a sample.

    `denoise(latents, timesteps, conditions)` sees `dtype`; the weighted sums are fp32. `conditions` have batch B and
    `unconditional` batch 1. Guidance (`u + guidance_scale * (c - u)`) runs both in one doubled batch, unconditional
    first, and not at all when `guidance_scale` is 1. `table` is on the device of `noise`. `before_step` may raise to give up.
    """
    predict = _predictor(denoise, conditions, unconditional, guidance_scale, len(noise), noise.device, dtype)
    known = noise.new_empty((len(table.inputs) + 1, *noise.shape), dtype=torch.float32)  # the noise, then each output
    known[0] = noise
    for i, timestep in enumerate(table.timesteps.unbind()):
        before_step()
        latents = _weighted_sum(table.inputs[i, :i + 1], known[:i + 1])
        known[i + 1] = predict(latents, timestep)
    return _weighted_sum(table.outputs[-1], known)


def _predictor(denoise: Denoise, conditions: Conditions, unconditional: Conditions, guidance_scale: float, batch: int,
               device: torch.device, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a function of latents and timestep, with conditions and guidance put in."""
    conditions = {name: value.to(device, dtype) for name, value in conditions.items()}
    if guidance_scale == 1:
        return lambda latents, timestep: denoise(latents.to(dtype), timestep.expand(batch), conditions).float()

    both = {name: torch.cat([unconditional[name].to(device, dtype).expand_as(value), value])
            for name, value in conditions.items()}

    def guided(latents: Tensor, timestep: Tensor) -> Tensor:
        twice = torch.cat([latents, latents]).to(dtype)
        without, given = denoise(twice, timestep.expand(2 * batch), both).float().chunk(2)
        return without + guidance_scale * (given - without)

    return guided


def _weighted_sum(weights: Tensor, terms: Tensor) -> Tensor:
    """Sum of `weights[i] * terms[i]`. Not a matrix product: TF32 or autocast would round the weights."""
    return (weights.view(-1, *[1] * (terms.dim() - 1)) * terms).sum(0)
