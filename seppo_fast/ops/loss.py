"""`seppo_loss`: checks, choice of backend, reduction and statistics."""

import math
from functools import cache, lru_cache
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from seppo_fast.ops import native
from seppo_fast.ops.fused import fused_loss
from seppo_fast.ops.reference import mean_squared_errors, pair_losses

FUSED_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FLIPPERS = ("aaf", "indicator", "none")
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("native", "triton", "reference")  # fastest first


class SeppoStats(NamedTuple):
    """What one call saw, detached, on the inputs' device. The last two are shares: average them over equal batches."""

    model_mse: Tensor  # (2B,) the policy's MSE, winners first
    ref_mse: Tensor  # (2B,) the reference's
    sign: Tensor  # (B,) the flipper: -1 keeps the loser a loser
    logits: Tensor  # (B,) argument of the log-sigmoid
    implicit_acc: Tensor  # () share of logits > 0
    aaf_rate: Tensor  # () share of signs == -1


def available_backends(device: torch.device | str | None = None) -> dict[str, str]:
    """Every backend, fastest first: "available" or the reason why not. `backend="auto"` takes the first available.

    For tensors on `device`; by default a CUDA GPU if there is one, else the CPU.
    """
    device_type = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    return {name: _why_not(name, device_type) or "available" for name in BACKENDS}


@torch.compiler.assume_constant_result  # a graph that is being traced cannot load libraries
def _why_not(backend: str, device_type: str) -> str | None:
    """None or why not. Not before it is asked for: importing triton takes a while, and asking for GPUs starts CUDA."""
    return _find_out(backend, device_type)


@cache
def _find_out(backend: str, device_type: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "native":
        return native.why_not(device_type)
    try:
        from seppo_fast.ops import triton_kernel
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return triton_kernel.why_not(device_type)


@overload
def seppo_loss(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta: float = ..., *, flipper: str = ...,
               reduction: str = ..., backend: str = ..., grad_scale: float | None = ...,
               return_stats: Literal[False] = ...) -> Tensor: ...


@overload
def seppo_loss(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta: float = ..., *, flipper: str = ...,
               reduction: str = ..., backend: str = ..., grad_scale: float | None = ...,
               return_stats: Literal[True]) -> tuple[Tensor, SeppoStats]: ...


def seppo_loss(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta: float = 2000.0, *, flipper: str = "aaf",
               reduction: str = "mean", backend: str = "auto", grad_scale: float | None = None,
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
        backend: `"auto"` or a name from `available_backends()`. fp64 takes the reference.
        grad_scale: the upstream gradient (of each loss, with "none") where the host knows it, such as DeepSpeed's 1 /
            accumulation steps. backward then uses this number *instead of* the one that arrives: the gradient is ready
            when the loss is, rounded once, and backward launches nothing. The loss itself is not scaled; where it is not
            finite, nor is the gradient.
        return_stats: also return a `SeppoStats`.

    Returns the loss in fp32 (fp64 when an input is), whatever the inputs' dtype. Nothing here waits for the device. A
    sample that is not finite spoils its own pair's loss and gradient and no other's.
    """
    device_type, wide = _check_tensors(model_pred, ref_pred, target)
    if torch.compiler.is_compiling():  # once, and Dynamo warns of caches
        _check_options(beta, flipper, reduction, grad_scale)
    else:
        try:
            _check_options_once(beta, flipper, reduction, grad_scale)
        except TypeError as error:
            raise (TypeError("beta, flipper, reduction and grad_scale must be numbers and names, got something unhashable")
                   if "unhashable" in str(error) else error) from None
    backend = _choose(backend, device_type)
    if wide:
        backend = "reference"
    if backend != "reference":
        loss, stats = fused_loss(model_pred, ref_pred, target, beta, flipper, reduction, backend, grad_scale)
        return (loss, _unpacked(stats, model_pred.shape[0])) if return_stats else loss
    losses, sign, logits = pair_losses(model_pred, ref_pred, target, beta, flipper)
    if grad_scale is not None:  # before the reduction, so that a pair that is not finite stays alone
        losses = _FixedUpstream.apply(losses, grad_scale / len(losses) if reduction == "mean" else grad_scale)
    loss = losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses
    if not return_stats:
        return loss
    logits = logits.detach()
    return loss, SeppoStats(*mean_squared_errors(model_pred, ref_pred, target), sign, logits,
                            implicit_acc=_share(logits > 0, logits.dtype), aaf_rate=_share(sign == -1, logits.dtype))


def _unpacked(stats: Tensor, samples: int) -> SeppoStats:
    """Views of a fused backend's statistics; their order is in fused.py."""
    pairs = samples // 2
    *each, _, implicit_acc, aaf_rate = stats.split_with_sizes((samples, samples, pairs, pairs, pairs, 1, 1))
    return SeppoStats(*each, implicit_acc.view(()), aaf_rate.view(()))


def _share(condition: Tensor, dtype: torch.dtype) -> Tensor:
    return condition.mean(dtype=dtype)


class _FixedUpstream(torch.autograd.Function):
    """The identity, whose upstream gradient is replaced by `grad_scale`, or by NaN where the loss is not finite."""

    @staticmethod
    def forward(ctx, loss: Tensor, grad_scale: float) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.grad_scale = grad_scale
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        loss, = ctx.saved_tensors
        return torch.full_like(upstream, ctx.grad_scale).where(loss.isfinite(), torch.nan), None


def _check_tensors(model_pred: Tensor, ref_pred: Tensor, target: Tensor) -> tuple[str, bool]:
    """The type of the common device, and whether an input is fp64."""
    try:  # what is nearly always true, in a few comparisons; anything else is looked at closely
        dtypes = (model_pred.dtype, ref_pred.dtype, target.dtype)
        shape, target_shape, device = model_pred.shape, target.shape, model_pred.device
        if (FUSED_DTYPES.issuperset(dtypes) and shape == ref_pred.shape and len(shape) > 1 and not shape[0] % 2
                and (target_shape == shape or target_shape[0] * 2 == shape[0] and target_shape[1:] == shape[1:])
                and 0 not in shape and device == ref_pred.device and device == target.device):
            return device.type, False
    except (AttributeError, IndexError, TypeError):
        pass
    _explain_tensors(model_pred, ref_pred, target)
    return model_pred.device.type, True


def _explain_tensors(model_pred: Tensor, ref_pred: Tensor, target: Tensor) -> None:
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


def _check_options(beta: float, flipper: str, reduction: str, grad_scale: float | None) -> None:
    for name, number in (("beta", beta), ("grad_scale", grad_scale)):
        if isinstance(number, bool) or not isinstance(number, (int, float)) and (name == "beta" or number is not None):
            raise TypeError(f"{name} must be a Python number, got {type(number).__name__}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if grad_scale is not None and not math.isfinite(grad_scale):
        raise ValueError(f"grad_scale must be finite, got {grad_scale}")
    if flipper not in FLIPPERS:
        raise ValueError(f"flipper must be one of {', '.join(FLIPPERS)}, got {flipper!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


_check_options_once = lru_cache(typed=True)(_check_options)  # a loop passes the same few numbers and names for ever


def _choose(backend: str, device_type: str) -> str:
    """The name of a backend that works for this type of device."""
    if backend == "auto":
        return next(name for name in BACKENDS if _why_not(name, device_type) is None)
    if backend in BACKENDS and _why_not(backend, device_type) is None:
        return backend
    usable = ", ".join(name for name in BACKENDS if _why_not(name, device_type) is None)
    if backend in BACKENDS:
        raise ValueError(f"backend {backend!r} cannot run on {device_type} tensors here:"
                         f" {_why_not(backend, device_type)}; use 'auto' or one of: {usable}")
    raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}; available: {usable}")
