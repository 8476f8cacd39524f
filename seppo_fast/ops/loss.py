"""`seppo_loss`: checks, choice of backend, reduction and statistics."""

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from seppo_fast.ops.reference import mean_squared_errors, pair_losses

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLIPPERS = ("aaf", "indicator", "none")
REDUCTIONS = ("mean", "sum", "none")

# Fastest first. What is not there says why, in the words the error message uses.
BACKENDS = {
    "native": "not built in this version of seppo_fast",
    "triton": "not built in this version of seppo_fast",
    "reference": "available",
}


class SeppoStats(NamedTuple):
    """What one call saw, detached, on the inputs' device. The last two are shares: average them over equal batches."""

    model_mse: Tensor  # (2B,) the policy's MSE, winners first
    ref_mse: Tensor  # (2B,) the reference's
    sign: Tensor  # (B,) the flipper: -1 keeps the loser a loser
    logits: Tensor  # (B,) argument of the log-sigmoid
    implicit_acc: Tensor  # () share of logits > 0
    aaf_rate: Tensor  # () share of signs == -1


def available_backends() -> dict[str, str]:
    """Every backend, fastest first: "available" or the reason why not. `backend="auto"` takes the first available."""
    return dict(BACKENDS)


@overload
def seppo_loss(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta: float = ..., *, flipper: str = ...,
               reduction: str = ..., backend: str = ..., return_stats: Literal[False] = ...) -> Tensor: ...


@overload
def seppo_loss(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta: float = ..., *, flipper: str = ...,
               reduction: str = ..., backend: str = ..., return_stats: Literal[True]) -> tuple[Tensor, SeppoStats]: ...


def seppo_loss(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta: float = 2000.0, *, flipper: str = "aaf",
               reduction: str = "mean", backend: str = "auto",
               return_stats: bool = False) -> Tensor | tuple[Tensor, SeppoStats]:
    """The SePPO loss (Eq. 8 in the convention of App. B.2) of B pairs: `-logsigmoid(z)`, reduced.

    With m and q the mean squared errors of `model_pred` and `ref_pred` against `target`, w the winner and l the loser,
    `z = -0.5 * beta * ((m_w - q_w) + s * (m_l - q_l))`. The sign s is decided by the winner alone:

    flipper      m_w > q_w   otherwise (ties too)
    "aaf"           +1          -1             the anchor-based adaptive flipper
    "indicator"      0          -1             the ablation with 1(x > 0): learn from the winner alone, or Diffusion-DPO
    "none"          -1          -1             Diffusion-DPO

    Eq. 9 of the paper has the opposite sign for the same thing (and Eq. 8 subtracts it), and as printed it takes a tie
    for the other case; App. B.2 is followed here, so `aaf_rate` is the share of s == -1, ties included.

    Args:
        model_pred: `(2B, ...)` the policy's predictions, winners first; fp32, fp16, bf16 or fp64. The gradient flows
            here only, in this dtype.
        ref_pred: `(2B, ...)` the reference policy's, any of these dtypes.
        target: what both should have predicted, `(2B, ...)`, or `(B, ...)` when the two halves share the noise.
        beta: how far the policy may move from the reference; 2000 in the paper.
        reduction: `"mean"` or `"sum"` over pairs, or `"none"` for `(B,)`.
        backend: `"auto"` or a name from `available_backends()`.
        return_stats: also return a `SeppoStats`.

    Returns the loss in fp32 (fp64 when an input is), whatever the inputs' dtype. Nothing here waits for the device. A
    sample that is not finite spoils its own pair's loss and gradient and no other's.
    """
    _check_tensors(model_pred, ref_pred, target)
    _check_options(beta, flipper, reduction, backend)
    losses, sign, logits = pair_losses(model_pred, ref_pred, target, beta, flipper)
    loss = losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses
    if not return_stats:
        return loss
    model_mse, ref_mse = mean_squared_errors(model_pred, ref_pred, target)
    logits = logits.detach()
    return loss, SeppoStats(model_mse, ref_mse, sign, logits, implicit_acc=(logits > 0).to(logits.dtype).mean(),
                            aaf_rate=(sign == -1).to(logits.dtype).mean())


def _check_tensors(model_pred: Tensor, ref_pred: Tensor, target: Tensor) -> None:
    named = (("model_pred", model_pred), ("ref_pred", ref_pred), ("target", target))
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    shape = tuple(model_pred.shape)
    if len(shape) < 2:
        raise ValueError(f"model_pred must have shape (2B, ...) with at least 2 dimensions, got {shape}")
    if shape[0] % 2:
        raise ValueError(f"model_pred must hold winners, then as many losers: an even first dimension, got {shape}")
    if 0 in shape:
        raise ValueError(f"model_pred must not be empty, got {shape}")
    if tuple(ref_pred.shape) != shape:
        raise ValueError(f"ref_pred must have model_pred's shape {shape}, got {tuple(ref_pred.shape)}")
    shared = (shape[0] // 2, *shape[1:])
    if tuple(target.shape) not in (shape, shared):
        raise ValueError(f"target must have model_pred's shape {shape}, or {shared} when both halves share it,"
                         f" got {tuple(target.shape)}")
    for name, tensor in named[1:]:
        if tensor.device != model_pred.device:
            raise ValueError(f"{name} must be on model_pred's device {model_pred.device}, got {tensor.device}")


def _check_options(beta: float, flipper: str, reduction: str, backend: str) -> None:
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"beta must be a Python number, got {type(beta).__name__}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if flipper not in FLIPPERS:
        raise ValueError(f"flipper must be one of {', '.join(FLIPPERS)}, got {flipper!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if backend == "auto" or BACKENDS.get(backend) == "available":
        return
    usable = ", ".join(name for name, state in BACKENDS.items() if state == "available")
    if backend in BACKENDS:
        raise ValueError(f"backend {backend!r} is {BACKENDS[backend]}; use 'auto' or one of: {usable}")
    raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}; available: {usable}")
