"""The fused backends under autograd: one pass computes losses, statistics and gradient; backward only hands it over.

A backend is a function `(model_pred, ref_pred, target, beta, flipper, scale)` of dense tensors in one memory format that
returns `(losses (B,), model_mse (2B,), ref_mse (2B,), sign (B,), logits (B,), grad)`, with
`grad = scale * d(sum of losses) / d(model_pred)` in model_pred's dtype and layout. While compiling it is an operator, so
that the graph stays whole; in eager mode whatever has the least overhead.
"""

import torch
from torch import Tensor

FLIPPER_CODES = {"aaf": 0, "indicator": 1, "none": 2}  # those of csrc/pair_loss.h

_INPUTS = "Tensor model_pred, Tensor ref_pred, Tensor target, float beta, int flipper, float scale"
_OUTPUTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"
_LIBRARY = torch.library.Library("seppo_fast", "FRAGMENT")
for _schema in (f"pair_loss({_INPUTS}) -> ({_OUTPUTS})", f"pair_loss_triton({_INPUTS}) -> ({_OUTPUTS})",
                f"pair_loss_total({_INPUTS}, float weight) -> (Tensor, {_OUTPUTS})",  # CPU: also weight * sum of losses
                "rescale(Tensor grad, Tensor upstream, float factor) -> Tensor"):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_pair_loss = torch.ops.seppo_fast.pair_loss.default
_pair_loss_total = torch.ops.seppo_fast.pair_loss_total.default
_pair_loss_triton = torch.ops.seppo_fast.pair_loss_triton.default
_rescale = torch.ops.seppo_fast.rescale.default


@torch.library.register_fake("seppo_fast::pair_loss_triton", lib=_LIBRARY)
@torch.library.register_fake("seppo_fast::pair_loss", lib=_LIBRARY)
def _fake(model_pred, ref_pred, target, beta, flipper, scale):
    samples, pairs = ((n,) for n in (model_pred.shape[0], model_pred.shape[0] // 2))
    return (*(model_pred.new_empty(shape, dtype=torch.float32) for shape in (pairs, samples, samples, pairs, pairs)),
            torch.empty_like(model_pred))


@torch.library.register_fake("seppo_fast::pair_loss_total", lib=_LIBRARY)
def _(model_pred, ref_pred, target, beta, flipper, scale, weight):
    return (model_pred.new_empty((), dtype=torch.float32), *_fake(model_pred, ref_pred, target, beta, flipper, scale))


@torch.library.register_fake("seppo_fast::rescale", lib=_LIBRARY)
def _(grad, upstream, factor):
    return torch.empty_like(grad)


def _launch_triton(*arguments):
    from seppo_fast.ops import triton_kernel  # takes a while to import, and not everyone needs it
    return triton_kernel.pair_loss(*arguments)


_LIBRARY.impl("pair_loss_triton", _launch_triton, "CompositeExplicitAutograd")


def fused_loss(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta: float, flipper: str, reduction: str,
               backend: str, grad_scale: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reduced loss, model_mse (2B,), ref_mse (2B,), sign (B,), logits (B,), from checked inputs."""
    if ref_pred.requires_grad:
        ref_pred = ref_pred.detach()
    if target.requires_grad:
        target = target.detach()
    weight = 1.0 if reduction != "mean" else 2.0 / model_pred.shape[0]
    known = grad_scale is not None
    # Below autograd: the operator's outputs are constants, and one node hands the gradient over.
    policy = model_pred.detach()
    if policy.dtype is torch.float16 and not known:
        policy = policy.float()  # fp16 may not hold the gradient before its upstream gradient (a loss scale) is in
    if not (policy.is_contiguous() and ref_pred.is_contiguous() and target.is_contiguous()):
        policy, ref_pred, target = _alike(policy, ref_pred, target)
    arguments = (policy, ref_pred, target, beta, FLIPPER_CODES[flipper], weight * grad_scale if known else weight)
    compiling = torch.compiler.is_compiling()
    if backend == "native" and reduction != "none" and policy.is_cpu:
        loss, _, model_mse, ref_mse, sign, logits, grad = _pair_loss_total(*arguments, weight)
    else:
        compute = _pair_loss if backend == "native" else _pair_loss_triton if compiling else _launch_triton
        loss, model_mse, ref_mse, sign, logits, grad = compute(*arguments)
        if reduction != "none":
            loss = loss.view(()) if loss.shape[0] == 1 else loss.mean() if reduction == "mean" else loss.sum()
    if model_pred.requires_grad and torch.is_grad_enabled():
        plain = compiling or torch._C._are_functorch_transforms_active()
        loss = (_Attach.apply if plain else _attach)(model_pred, loss, grad, known, backend)
    return loss, model_mse, ref_mse, sign, logits


_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph  # by retain_graph or create_graph


class _Attach(torch.autograd.Function):
    """The loss as a function of `model_pred` whose gradient is there already, but for an upstream gradient not `known`."""

    @staticmethod
    def forward(ctx, model_pred, loss, grad, known, backend):
        ctx.save_for_backward(grad, model_pred)  # the latter only to say that there is no second derivative
        ctx.known, ctx.backend = known, backend
        return loss

    @staticmethod
    def backward(ctx, upstream):
        grad, model_pred = ctx.saved_tensors
        if not (ctx.known or _is_one(upstream)):
            grad = _rescale(grad, upstream.detach(), 1.0) if ctx.backend == "native" else _multiplied(grad, upstream)
        elif not torch.compiler.is_compiling() and _graph_is_kept():
            grad = grad.clone()  # there may be a next time, and who gets a gradient may change it in place
        if grad.dtype is not model_pred.dtype:
            grad = grad.to(model_pred.dtype)
        if torch.is_grad_enabled():
            grad = _NoSecondDerivative.apply(grad, model_pred)
        return grad, None, None, None, None


# Function.apply without what it does in Python for functorch's sake.
_attach = super(torch.autograd.Function, _Attach).apply


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, model_pred):
        return grad.clone()

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError("seppo_loss: the fused backends have no second derivative; use backend='reference'")


def _is_one(upstream: Tensor) -> bool:
    """Whether nothing is left to multiply by, where asking is free: a plain tensor on the CPU."""
    return type(upstream) is Tensor and upstream.is_cpu and not upstream.dim() and not torch.compiler.is_compiling() and (
        upstream.item() == 1.0)


@torch.no_grad()
def _multiplied(grad: Tensor, upstream: Tensor) -> Tensor:
    """`upstream * grad`, rounded once to grad's dtype, in one launch; `upstream` is () or, one for each pair, (B,)."""
    out = torch.empty_like(grad)
    halves, pairs = (2, -1), (1, -1) + (1,) * (grad.dim() - 1)
    # With a dimension the fp32 number decides the dtype of the product, and `out` what is stored, where a 0-d tensor would
    # be rounded to grad's dtype first.
    torch.mul(grad.unflatten(0, halves), upstream.view(pairs), out=out.unflatten(0, halves))
    return out


def _alike(model_pred: Tensor, ref_pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values, each sample dense, all in model_pred's memory format; no copy where that is so already."""
    layout = torch.contiguous_format
    for dims, candidate in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if model_pred.dim() == dims and model_pred.is_contiguous(memory_format=candidate):
            layout = candidate
    return tuple(x.contiguous(memory_format=layout) for x in (model_pred, ref_pred, target))
