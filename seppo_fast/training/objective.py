"""One micro-batch: noise the pairs, predict with policy and reference, compare (Eq. 8; Algorithm 1, line 4)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from seppo_fast.models import Conditions
from seppo_fast.ops import per_sample_mse, seppo_loss
from seppo_fast.ops.reference import excess, sign_of
from seppo_fast.reference.blocks import offloads_blocks
from seppo_fast.reference.tuning import Change, changed
from seppo_fast.training.noise import NoiseProcess

Denoise = Callable[[nn.Module, Tensor, Tensor, Conditions], Tensor]


@dataclass(frozen=True)
class Pairs:
    """A micro-batch of B pairs on the device: winners first, then losers; B pictures alone where nothing is compared."""

    latents: Tensor  # (2B, C, h, w), scaled
    noise: Tensor  # (2B, C, h, w), or (B, C, h, w) when both halves share it
    timesteps: Tensor  # (B,) one a pair
    conditions: Conditions  # (B, ...)
    ref_mse: Tensor | None = None  # (2B,) fp32, the reference's errors, where they are known already
    tasks: Tensor | None = None  # (B,) which task each is, for the improvement model
    more_noise: Tensor | None = None  # (n, B, C, h, w), of the winners, for the sign alone


class Noised(NamedTuple):
    """The inputs of policy and reference for all samples of a micro-batch, and what they should predict."""

    latents: Tensor  # (2B, C, h, w)
    timesteps: Tensor  # (2B,)
    conditions: Conditions  # (2B, ...)
    target: Tensor  # (2B, C, h, w), or (B, C, h, w) when both halves share it


@dataclass(frozen=True)
class Objective:
    """What turns a micro-batch into a loss; `flipper` None: mean squared errors. `dtype`, `autocast`: of policy and reference.
    `sft_weight`: how much of the winner's mean squared error is added to a pair's loss.

    `compiled`: compiled kernels with gradients differ from those without, so the reference runs with gradients, too. So do the
    kernels of PyTorch's attention: call forward and backward within `same_with_gradients()`. `whole` has the compiled forward of
    networks that are compiled as one graph, for this objective alone.
    """

    denoise: Denoise
    process: NoiseProcess
    flipper: str | None
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    compiled: bool = False
    sft_weight: float = 0.0
    whole: Mapping[nn.Module, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, policy: nn.Module, reference: nn.Module | None, pairs: Pairs, upstream: float, beta: float
                 ) -> tuple[Tensor, Tensor]:
        """The scalar loss, and `(B, 6)` detached: MSEs of policy (w, l) and reference (w, l), sign, logit; `(B, 1)` for SFT,
        `(B, 2)` with the task for the improvement model.

        `upstream` is the gradient that backward will be called with; `beta` is not used without a flipper. A loss that is not
        finite has no finite gradients. The reference is not called where the pairs have its errors. It is None where the policy
        still equals the reference, whose predictions would be the same. Nothing waits for the device.
        """
        noised = self._noised(pairs)
        ref_pred = more = sign = None
        if self.flipper and reference is not None and pairs.ref_mse is None:
            more = None if pairs.more_noise is None else self.winner_excess(policy, reference, pairs)
            with torch.set_grad_enabled(self.compiled):  # before the policy, whose activations are then alone
                ref_pred = self._predict(reference, noised).detach()
        model_pred = self._predict(policy, noised)
        if self.flipper is None:
            mse = mse_loss(model_pred.float(), noised.target.float(), reduction="none").flatten(1).mean(dim=1)
            columns = [mse.detach()] + ([pairs.tasks.to(mse.dtype)] if pairs.tasks is not None else [])
            return finite_or_nan(mse.mean()), torch.stack(columns, dim=1)
        ref_mse = pairs.ref_mse
        if reference is None:
            ref_pred, ref_mse = model_pred.detach(), None
        if more is not None and ref_pred is not None:
            sign = _sign_of_all(more, model_pred.detach(), ref_pred, noised.target, self.flipper)
        loss, stats = seppo_loss(model_pred, ref_pred, noised.target, beta, ref_mse=ref_mse, flipper=self.flipper, sign=sign,
                                 sft_weight=self.sft_weight, grad_scale=upstream, return_stats=True)
        columns = [*stats.model_mse.chunk(2), *stats.ref_mse.chunk(2), stats.sign, stats.logits]
        return loss, torch.stack(columns, dim=1)

    def prediction(self, module: nn.Module, pairs: Pairs) -> Tensor:
        """What the network answers to the noised pairs, (2B, C, h, w)."""
        return self._predict(module, self._noised(pairs))

    @torch.no_grad()
    def score(self, reference: nn.Module, pairs: Pairs) -> Tensor:
        """`(B, 2)` fp32: the reference's MSEs on winner and loser, as `__call__` would compute them."""
        noised = self._noised(pairs)
        return per_sample_mse(self._predict(reference, noised), noised.target).unflatten(0, (2, -1)).T

    def winner_excess(self, policy: nn.Module, reference: nn.Module, pairs: Pairs) -> Tensor:
        """(n, B): by how much the policy's error on the winners is larger than the reference's under each further noise, at the
        pairs' own timesteps. Both run alike, so that equal networks have no difference; as many samples at once as in a pair."""
        assert pairs.more_noise is not None
        winners, found = pairs.latents[:len(pairs.timesteps)], []
        with torch.set_grad_enabled(self.compiled):
            for noise in pairs.more_noise.split(2):
                noised = self._noised(Pairs(torch.cat([winners] * len(noise)), noise.flatten(0, 1), pairs.timesteps,
                                            pairs.conditions))
                ref_pred, model_pred = (self._predict(network, noised).detach() for network in (reference, policy))
                found.append(_mean_excess(model_pred, ref_pred, noised.target).unflatten(0, (len(noise), -1)))
        return torch.cat(found)

    def _noised(self, pairs: Pairs) -> Noised:
        halves = len(pairs.latents) // len(pairs.timesteps)
        timesteps = pairs.timesteps.repeat(halves)
        noise = torch.cat([pairs.noise] * (len(pairs.latents) // len(pairs.noise)))
        conditions = {name: torch.cat([value] * halves) for name, value in pairs.conditions.items()}
        target = self.process.target(pairs.latents, noise, timesteps)
        return Noised(self.process.noised(pairs.latents, noise, timesteps), timesteps, conditions,
                      pairs.noise if target is None else target)

    def _predict(self, module: nn.Module, noised: Noised) -> Tensor:
        network = getattr(module, "module", module)  # inside DeepSpeed's engine
        forward: list[Change] = [(network, "forward", self.whole[network])] if network in self.whole else []
        with self.precision(noised.latents.device, keeps_casts=not offloads_blocks(module)), changed(forward):
            return self.denoise(module, noised.latents.to(self.dtype), noised.timesteps, noised.conditions)

    def precision(self, device: torch.device, keeps_casts: bool = True) -> AbstractContextManager:
        """The mode in which policy and reference both run: a rounding difference between them would decide the first signs.

        `keeps_casts`: until the end of the block, autocast keeps what it casts of weights, on the device.
        """
        return torch.autocast(device.type, self.autocast, cache_enabled=keeps_casts) if self.autocast else nullcontext()


def _mean_excess(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """(N,): the policy's MSE minus the reference's, exactly 0 where both predict the same."""
    return excess(policy.float(), reference.float(), target.float()).flatten(1).mean(dim=1)


def _sign_of_all(more: Tensor, model_pred: Tensor, ref_pred: Tensor, target: Tensor, flipper: str) -> Tensor:
    """(B,): the flipper's sign of the mean over the pairs' own noise, under which both predicted, and the further ones.

    Where the mean is not finite the sign is neither, so that the loss shows it.
    """
    winners = slice(more.shape[1])
    mean = torch.cat([_mean_excess(model_pred[winners], ref_pred[winners], target[winners])[None], more]).mean(dim=0)
    return sign_of(mean, flipper) + (mean - mean)


def finite_or_nan(loss: Tensor) -> Tensor:
    """The loss, with NaN gradients where it is not finite: the trainer then has to test the gradients only."""
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)
