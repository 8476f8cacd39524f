"""The specification of the SePPO loss (Eq. 8, App. B.2) in plain PyTorch: every other backend is compared with it.

Eq. 9 and App. B.2 write the same flipper with opposite signs. Eq. 9's is +1 where the policy beats the reference on the
winner, and Eq. 8 subtracts it. App. B.2's is +1 where the policy is *worse* there, and it is added. They differ only at
a tie: both are then -1, which means "the reference sample stays the loser" in App. B.2 and the opposite in Eq. 9 as
printed. This code follows App. B.2: a tie is -1, so the first step from a fresh checkpoint is Diffusion-DPO's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_losses(model_pred: Tensor, reference: Tensor, target: Tensor, beta: float,
                flipper: str, sft_weight: float, sign: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sign and logit of each pair, `(B,)` each, from predictions `(2B, ...)` and a target of all or half of that.

    `reference`: predictions like model_pred, or their mean squared errors `(2B,)`. `sft_weight`: how much of the winner's MSE
    is added to the loss. `sign`: `(B,)`, in place of the flipper's. fp32, or fp64 when an input is fp64;
    differentiable in `model_pred` alone.
    """
    policy, reference, target = _widened(model_pred, reference.detach(), target.detach())
    if reference.dim() == 2:
        # An infinite reference error would give a loss of 0, as of a pair learnt perfectly: Inf - Inf makes it NaN.
        difference = _mean_square(policy - target) - (reference + (reference - reference))
    else:
        difference = excess(policy, reference, target).mean(list(range(2, policy.dim())))
    winner, loser = difference
    sign = sign_of(winner.detach(), flipper) if sign is None else sign.detach().to(winner.dtype)
    logits = -0.5 * beta * (winner + sign * loser)
    losses = -F.logsigmoid(logits)
    if sft_weight:
        losses = losses + sft_weight * _mean_square(policy[:1] - target[:1])[0]
    return losses, sign, logits


@torch.no_grad()
def mean_squared_errors(model_pred: Tensor, reference: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """MSE of the policy and of the reference for each sample, `(2B,)` each, winners first."""
    policy, reference, target = _widened(model_pred, reference, target)
    ref_mse = reference if reference.dim() == 2 else _mean_square(reference - target)
    return _mean_square(policy - target).flatten(), ref_mse.flatten()


def excess(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """The policy's squared error minus the reference's, of each element, as a product.

    Subtracting the two MSEs would cancel nearly all their digits where the sign is decided, and would not be exactly zero for
    equal predictions.
    """
    return (policy - reference) * (policy + reference - 2 * target)


def _mean_square(errors: Tensor) -> Tensor:
    """`(2, B, ...)` -> `(2, B)`, summed by adding halves.

    torch.mean may add in an order that depends on the number of samples, and then equal predictions have unequal errors.
    """
    sums = errors.square().flatten(2)
    elements = sums.shape[2]
    while sums.shape[2] > 1:
        half = (sums.shape[2] + 1) // 2
        sums = sums[..., :half] + F.pad(sums[..., half:], (0, sums.shape[2] % 2))
    return sums.squeeze(2) / elements


def _widened(policy: Tensor, reference: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs as `(2, B, ...)` in the dtype of the arithmetic; a target that both halves share is `(1, B, ...)`."""
    pairs = policy.shape[0] // 2
    wide = torch.float64 if torch.float64 in (policy.dtype, reference.dtype, target.dtype) else torch.float32
    halves = target.shape[0] // pairs
    return (policy.to(wide).unflatten(0, (2, pairs)), reference.to(wide).unflatten(0, (2, pairs)),
            target.to(wide).unflatten(0, (halves, pairs)))


def sign_of(winner: Tensor, flipper: str) -> Tensor:
    """`(B,)` the factor of the loser's difference: -1 pushes the policy away from it, +1 towards it, 0 neither."""
    worse = (winner > 0).to(winner.dtype)
    if flipper == "aaf":
        return 2 * worse - 1
    if flipper == "indicator":
        return worse - 1
    return torch.full_like(winner, -1)
