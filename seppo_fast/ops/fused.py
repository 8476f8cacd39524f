"""The fused backends under autograd: one pass computes losses, statistics and gradient; backward only hands it over.

A backend is a function `(model_pred, reference, target, beta, flipper, sft_weight, scale, weight, wants_grad, sign)` of dense
tensors in one memory format. It returns `(loss (), stats (7B + 2,), grad)`. `reference` holds predictions, shaped like
model_pred, or their mean squared errors, (2B,) in fp32; with errors, a sample's model_mse must not depend on the batch that it
is in. `sign`, (B,) in fp32, is in place of the flipper's, or None.
`loss` is weight times the sum of the pairs' losses. `stats` is one tensor, because allocating several costs most of the host's
time: model_mse (2B,), ref_mse (2B,), sign (B,), logits (B,), losses (B,), implicit_acc, aaf_rate. `grad` is
`scale * d(sum of losses) / d(model_pred)` in model_pred's dtype and layout, or (0,) without `wants_grad`. Under the compiler a
backend is called as an operator, so that the graph stays whole; in eager mode by the call with the least overhead.
"""

import torch
from torch import Tensor

FLIPPER_CODES = {"aaf": 0, "indicator": 1, "none": 2}  # those of csrc/pair_loss.h

_PAIR_LOSS = ("(Tensor model_pred, Tensor reference, Tensor target, float beta, int flipper, float sft_weight, float scale,"
              " float weight, bool wants_grad, Tensor? sign=None) -> (Tensor, Tensor, Tensor)")
_LIBRARY = torch.library.Library("seppo_fast", "FRAGMENT")
for _schema in (f"pair_loss{_PAIR_LOSS}", f"pair_loss_triton{_PAIR_LOSS}",
                "rescale(Tensor grad, Tensor upstream, float factor) -> Tensor",
                "rescale_(Tensor(a!) grad, Tensor upstream, float factor) -> ()"):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_pair_loss = torch.ops.seppo_fast.pair_loss.default
_pair_loss_triton = torch.ops.seppo_fast.pair_loss_triton.default
_rescale = torch.ops.seppo_fast.rescale.default
_rescale_in_place = torch.ops.seppo_fast.rescale_.default


@torch.library.register_fake("seppo_fast::pair_loss_triton", lib=_LIBRARY)
@torch.library.register_fake("seppo_fast::pair_loss", lib=_LIBRARY)
def _(model_pred, reference, target, beta, flipper, sft_weight, scale, weight, wants_grad, sign=None):
    stats = model_pred.new_empty((7 * (model_pred.shape[0] // 2) + 2,), dtype=torch.float32)
    return stats.new_empty(()), stats, torch.empty_like(model_pred) if wants_grad else model_pred.new_empty((0,))


@torch.library.register_fake("seppo_fast::rescale", lib=_LIBRARY)
def _(grad, upstream, factor):
    return torch.empty_like(grad)


@torch.library.register_fake("seppo_fast::rescale_", lib=_LIBRARY)
def _(grad, upstream, factor):
    return None


def _launch_triton(*arguments):
    from seppo_fast.ops import triton_kernel  # takes a while to import, and not everyone needs it
    return triton_kernel.pair_loss(*arguments)


_LIBRARY.impl("pair_loss_triton", _launch_triton, "CompositeExplicitAutograd")


def fused_loss(model_pred: Tensor, reference: Tensor, target: Tensor, beta: float, flipper: str, sft_weight: float,
               reduction: str, backend: str, grad_scale: float | None, sign: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reduced loss and the statistics (7B + 2,), from checked inputs."""
    wants_grad = model_pred.requires_grad and torch.is_grad_enabled()
    if reference.requires_grad:
        reference = reference.detach()
    if target.requires_grad:
        target = target.detach()
    if sign is not None:
        sign = sign.detach().contiguous()
    pairs = model_pred.shape[0] // 2
    weight = 1.0 / pairs if reduction == "mean" else 1.0
    scale = weight if grad_scale is None else weight * grad_scale
    # Below autograd: the operator's outputs are constants, and one autograd node passes the gradient on.
    policy = model_pred.detach() if wants_grad else model_pred
    if policy.dtype is torch.float16 and (wants_grad and grad_scale is None or reference.dim() == 1):
        # fp16 may not hold the gradient before it is multiplied by its upstream gradient (a loss scale). Kernels may add fp32
        # in another order than fp16, and equal errors need one order: so fp32 with and without a gradient.
        policy = policy.float()
    if not (policy.is_contiguous() and reference.is_contiguous() and target.is_contiguous()):
        policy, reference, target = _alike(policy, reference, target)
    compiling = torch.compiler.is_compiling()
    compute = _pair_loss if backend == "native" else _pair_loss_triton if compiling else _launch_triton
    loss, stats, grad = compute(policy, reference, target, beta, FLIPPER_CODES[flipper], sft_weight, scale, weight,
                                wants_grad, sign)
    if reduction == "none":
        loss = stats.narrow(0, 6 * pairs, pairs).clone()  # a view could not be changed in place
    if wants_grad:
        plain = compiling or torch._C._are_functorch_transforms_active()
        how = (grad_scale is not None, backend)
        loss = _Attach.apply(model_pred, loss, grad, how) if plain else _attach(model_pred, (loss,), grad, how)
    return loss, stats


# Whether retain_graph or create_graph keeps the graph. Not a public function: where it is missing, assume that they do.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class _Attach(torch.autograd.Function):
    """The loss as a function of `model_pred`. Its gradient is computed already, except for the factor of the upstream gradient."""

    @staticmethod
    def forward(ctx, model_pred, loss, grad, how):
        ctx.save_for_backward(grad, model_pred)  # model_pred only for the message that there is no second derivative
        ctx.how = how
        return loss[0] if type(loss) is tuple else loss  # hidden from autograd, which would make a view of an input

    @staticmethod
    def backward(ctx, upstream):
        grad, model_pred = ctx.saved_tensors
        known, backend = ctx.how
        # A kept graph may run backward again, and whoever gets a gradient may change it in place. Otherwise it is free to use.
        kept = not torch.compiler.is_compiling() and _graph_is_kept()
        if not (known or _is_one(upstream)):
            grad = _rescaled(grad, upstream.detach(), backend, in_place=not (kept or _is_traced()))
        elif kept:
            grad = grad.clone()
        if grad.dtype is not model_pred.dtype:
            grad = grad.to(model_pred.dtype)
        if torch.is_grad_enabled():
            grad = _NoSecondDerivative.apply(grad, model_pred)
        return grad, None, None, None


# Function.apply without its Python code for functorch.
_attach = super(torch.autograd.Function, _Attach).apply


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, model_pred):
        return grad.clone()

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError("seppo_loss: the fused backends have no second derivative; use backend='reference'")


def _is_one(upstream: Tensor) -> bool:
    """Whether the upstream gradient is 1, as far as reading it is free: for a plain tensor on the CPU."""
    return upstream.is_cpu and not upstream.dim() and not _is_traced() and upstream.item() == 1.0


def _is_traced() -> bool:
    """Whether values cannot be read and tensors not changed in place: under a compiler, or under vmap."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


@torch.no_grad()
def _rescaled(grad: Tensor, upstream: Tensor, backend: str, in_place: bool) -> Tensor:
    """`upstream * grad`, rounded once to grad's dtype, in one launch; `upstream` is () or, one for each pair, (B,)."""
    if backend == "native" and not in_place:
        return _rescale(grad, upstream, 1.0)
    if backend == "native":
        _rescale_in_place(grad, upstream, 1.0)
        return grad
    out = grad if in_place else torch.empty_like(grad)
    halves, pairs = (2, -1), (1, -1) + (1,) * (grad.dim() - 1)
    # A tensor with a dimension makes the product fp32, and `out` rounds it once. A 0-d tensor would be rounded to grad's dtype
    # first.
    torch.mul(grad.unflatten(0, halves), upstream.view(pairs), out=out.unflatten(0, halves))
    return out


def _alike(model_pred: Tensor, reference: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values, dense and in model_pred's memory format; copied only where they are not so already."""
    layout = torch.contiguous_format
    for dims, candidate in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if model_pred.dim() == dims and model_pred.is_contiguous(memory_format=candidate):
            layout = candidate
    policy, target = (x.contiguous(memory_format=layout) for x in (model_pred, target))
    return policy, reference.contiguous(memory_format=layout if reference.dim() > 1 else torch.contiguous_format), target
