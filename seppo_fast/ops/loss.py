"""`seppo_loss` and `per_sample_mse`: choice of backend, reduction and statistics."""

from functools import cache, lru_cache
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from seppo_fast.ops import native
from seppo_fast.ops.checks import ERRORS, PREDICTIONS, check_options, check_sign, check_tensors
from seppo_fast.ops.fused import fused_loss
from seppo_fast.ops.reference import mean_squared_errors, pair_losses

BACKENDS = ("native", "triton", "reference")  # fastest first
_check_options_once = lru_cache(typed=True)(check_options)  # a loop passes the same few numbers and names again and again


class SeppoStats(NamedTuple):
    """The statistics of one call, detached, on the inputs' device. The last two are shares: average them over equal batches."""

    model_mse: Tensor  # (2B,) the policy's MSE, winners first
    ref_mse: Tensor  # (2B,) the reference's
    sign: Tensor  # (B,) the flipper's, or the caller's: -1 keeps the loser a loser
    logits: Tensor  # (B,) argument of the log-sigmoid
    implicit_acc: Tensor  # () share of logits > 0
    aaf_rate: Tensor  # () share of signs == -1


def available_backends(device: torch.device | str | None = None) -> dict[str, str]:
    """Every backend, fastest first: "available" or the reason why not. `backend="auto"` takes the first available.

    For tensors on `device`; by default a CUDA GPU if there is one, else the CPU.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return {name: _why_not(name, device) or "available" for name in BACKENDS}


@torch.compiler.assume_constant_result  # a graph that is being traced cannot load libraries
def _why_not(backend: str, device: torch.device) -> str | None:
    """None or why not. Found at first use only: importing triton takes a while, and asking for GPUs starts CUDA."""
    return _find_out(backend, device)


@cache  # by the device, not by its type: one machine may have GPUs of several kinds
def _find_out(backend: str, device: torch.device) -> str | None:
    if backend == "reference":
        return None
    if backend == "native":
        return native.why_not(device)
    try:
        from seppo_fast.ops import triton_kernel
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return triton_kernel.why_not(device)


@overload
def seppo_loss(model_pred: Tensor, ref_pred: Tensor | None = ..., target: Tensor = ..., beta: float = ..., *,
               ref_mse: Tensor | None = ..., flipper: str = ..., sign: Tensor | None = ..., sft_weight: float = ...,
               reduction: str = ..., backend: str = ..., grad_scale: float | None = ...,
               return_stats: Literal[False] = ...) -> Tensor: ...


@overload
def seppo_loss(model_pred: Tensor, ref_pred: Tensor | None = ..., target: Tensor = ..., beta: float = ..., *,
               ref_mse: Tensor | None = ..., flipper: str = ..., sign: Tensor | None = ..., sft_weight: float = ...,
               reduction: str = ..., backend: str = ..., grad_scale: float | None = ...,
               return_stats: Literal[True]) -> tuple[Tensor, SeppoStats]: ...


def seppo_loss(model_pred: Tensor, ref_pred: Tensor | None = None, target: Tensor | None = None, beta: float = 2000.0, *,
               ref_mse: Tensor | None = None, flipper: str = "aaf", sign: Tensor | None = None, sft_weight: float = 0.0,
               reduction: str = "mean", backend: str = "auto", grad_scale: float | None = None, return_stats: bool = False
               ) -> Tensor | tuple[Tensor, SeppoStats]:
    """The SePPO loss (Eq. 8 in the convention of App. B.2) of B pairs: `-logsigmoid(z)`, reduced.

    Give the reference policy by its predictions, `ref_pred=`, or by its errors, `ref_mse=`.
    `z = -0.5 * beta * ((m_w - q_w) + s * (m_l - q_l))`, where m and q are the mean squared errors of `model_pred` and of the
    reference against `target`, w is the winner and l the loser. The winner alone decides the sign s:

    flipper      m_w > q_w   otherwise (ties too)
    "aaf"           +1          -1             the anchor-based adaptive flipper
    "indicator"      0          -1             the ablation with 1(x > 0): learn from the winner alone, or Diffusion-DPO
    "none"          -1          -1             Diffusion-DPO

    Eq. 9 of the paper has the opposite sign for the same thing (and Eq. 8 subtracts it), and as printed it counts a tie
    as the other case. This function follows App. B.2, so `aaf_rate` is the share of s == -1, ties included.

    Args:
        model_pred: `(2B, ...)` the policy's predictions, winners first; fp32, fp16, bf16 or fp64. Only this argument gets
            a gradient, in this dtype.
        ref_pred: `(2B, ...)` the reference policy's, any of these dtypes.
        target: what both should have predicted, `(2B, ...)`, or `(B, ...)` when the two halves share the noise.
        ref_mse: `(2B,)` fp32 (or fp64), in place of `ref_pred`: the reference's mean squared errors, winners first, as
            `per_sample_mse` makes them. With predictions, m - q is summed without cancellation and is exactly 0 where they
            are equal. With errors it is a difference of two fp32 means and keeps the roundings of both. Each unit in the
            last place of an MSE (at most 2^-23 of it) changes the logit by `beta / 2 * 2^-23` times the MSE: 1.2e-4 for an
            MSE of 1 at beta 2000, 3e-4 at 5000. Expect one or two such units in each half of a pair; a winner that is
            nearer to a tie than that may get either sign. Equal predictions tie only if both errors were added in the same
            order, which `per_sample_mse` does.
        beta: how strongly the loss holds the policy to the reference; 2000 in the paper.
        sign: `(B,)` fp32 of +1, -1 or 0, in place of the flipper's decision, which then has no effect: for a sign
            that more than this winner's error decides. Other values are not refused: nothing here reads them on the host.
        sft_weight: `sft_weight * m_w` is added to each pair's loss before the reduction: a guard against both errors rising
            together, which the logit does not see. The statistics do not contain it.
        reduction: `"mean"` or `"sum"` over pairs, or `"none"` for `(B,)`.
        backend: `"auto"` or a name from `available_backends()`. fp64 takes the reference.
        grad_scale: the upstream gradient (of each loss, with "none") where the host knows it, such as DeepSpeed's 1 /
            accumulation steps. backward then uses this number *instead of* the gradient that arrives: the final gradient
            is computed with the loss and rounded once, and backward launches nothing. The loss itself is not scaled. Where
            the loss is not finite, the gradient is not finite either.
        return_stats: also return a `SeppoStats`.

    Returns the loss in fp32 (fp64 when an input is), whatever the inputs' dtype. Nothing here waits for the device. A
    sample that is not finite makes its own pair's loss and gradient not finite, and no other pair's.
    """
    if (ref_pred is None) == (ref_mse is None):
        raise TypeError("seppo_loss wants the reference's predictions as ref_pred or their mean squared errors as ref_mse,"
                        f" got {'neither' if ref_mse is None else 'both'}")
    reference, names = (ref_pred, PREDICTIONS) if ref_mse is None else (ref_mse, ERRORS)
    wide = check_tensors(model_pred, reference, target, names)
    assert reference is not None and target is not None  # else check_tensors had raised
    if sign is not None:
        check_sign(sign, model_pred)
    if torch.compiler.is_compiling():  # once, and Dynamo warns of caches
        check_options(beta, flipper, sft_weight, reduction, grad_scale)
    else:
        try:
            _check_options_once(beta, flipper, sft_weight, reduction, grad_scale)
        except TypeError as error:
            raise (TypeError("beta, flipper, sft_weight, reduction and grad_scale must be numbers and names, got something"
                             " unhashable")
                   if "unhashable" in str(error) else error) from None
    backend = _choose(backend, model_pred.device)
    if wide:
        backend = "reference"
    if backend != "reference":
        loss, stats = fused_loss(model_pred, reference, target, beta, flipper, sft_weight, reduction, backend, grad_scale,
                                 sign)
        return (loss, _unpacked(stats, model_pred.shape[0])) if return_stats else loss
    losses, sign, logits = pair_losses(model_pred, reference, target, beta, flipper, sft_weight, sign)
    if grad_scale is not None:  # before the reduction, so that a pair that is not finite stays alone
        losses = _FixedUpstream.apply(losses, grad_scale / len(losses) if reduction == "mean" else grad_scale)
    loss = losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses
    if not return_stats:
        return loss
    logits = logits.detach()
    return loss, SeppoStats(*mean_squared_errors(model_pred, reference, target), sign, logits,
                            implicit_acc=_share(logits > 0, logits.dtype), aaf_rate=_share(sign == -1, logits.dtype))


@torch.no_grad()
def per_sample_mse(pred: Tensor, target: Tensor, *, backend: str = "auto") -> Tensor:
    """`(N,)` the mean squared error of each sample, fp32 (fp64 when an input is), detached: the value for `ref_mse=`.

    pred: `(N, ...)`; target: the same shape, or `(N / 2, ...)` when the second half of pred shares the first's.

    It is bit for bit the `model_mse` of `seppo_loss(pred, ref_mse=..., target=target, backend=backend)`, so a policy that is
    still equal to the reference ties. Both calls need the predictions in the same dtype and memory format. Their batches may
    have different sizes, and a sample may be a winner in one and a loser in the other.
    """
    count = len(pred) if isinstance(pred, Tensor) and pred.dim() else 0
    if count % 2 and isinstance(target, Tensor) and target.shape == pred.shape:  # backends know pairs
        pred, target = (torch.cat([x, x[-1:]]) for x in (pred, target))
    wide = check_tensors(pred, pred, target, ("pred", "pred", "target"))
    backend = _choose(backend, pred.device)
    nothing = torch.zeros(pred.shape[:1], device=pred.device)
    if wide or backend == "reference":
        return mean_squared_errors(pred, nothing, target)[0][:count]
    return fused_loss(pred, nothing, target, 1.0, "none", 0.0, "sum", backend, None)[1][:count]


def _unpacked(stats: Tensor, samples: int) -> SeppoStats:
    """Views of a fused backend's statistics; their order is in fused.py."""
    pairs = samples // 2
    sizes = (samples, samples, pairs, pairs, pairs, 1, 1)
    model_mse, ref_mse, sign, logits, _, implicit_acc, aaf_rate = stats.split_with_sizes(sizes)
    return SeppoStats(model_mse, ref_mse, sign, logits, implicit_acc.view(()), aaf_rate.view(()))


def _share(condition: Tensor, dtype: torch.dtype) -> Tensor:
    return condition.mean(dtype=dtype)


class _FixedUpstream(torch.autograd.Function):
    """The identity; its upstream gradient is replaced by `grad_scale`, or by NaN where the loss is not finite."""

    @staticmethod
    def forward(ctx, loss: Tensor, grad_scale: float) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.grad_scale = grad_scale
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        loss, = ctx.saved_tensors
        return torch.full_like(upstream, ctx.grad_scale).where(loss.isfinite(), torch.nan), None


def _choose(backend: str, device: torch.device) -> str:
    """The name of a backend that works on this device."""
    if backend == "auto":
        return next(name for name in BACKENDS if _why_not(name, device) is None)
    if backend in BACKENDS and _why_not(backend, device) is None:
        return backend
    usable = ", ".join(name for name in BACKENDS if _why_not(name, device) is None)
    if backend in BACKENDS:
        raise ValueError(f"backend {backend!r} cannot run on {device.type} tensors here:"
                         f" {_why_not(backend, device)}; use 'auto' or one of: {usable}")
    raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}; available: {usable}")
