"""What the fused loss is compared with: the usual implementation, the same compiled, and one whose forward makes the gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor


def app_b2(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta: float = 2000.0) -> Tensor:
    """App. B.2 line by line, in fp32, as a trainer would write it."""
    dims = list(range(1, model_pred.dim()))
    model_losses = (model_pred.float() - target.float()).pow(2).mean(dim=dims)
    model_losses_w, model_losses_l = model_losses.chunk(2)
    with torch.no_grad():
        ref_losses = (ref_pred.float() - target.float()).pow(2).mean(dim=dims)
        ref_losses_w, ref_losses_l = ref_losses.chunk(2)
        sign = torch.where(model_losses_w - ref_losses_w > 0, 1.0, -1.0)
    model_diff = model_losses_w + sign * model_losses_l
    ref_diff = ref_losses_w + sign * ref_losses_l
    return -F.logsigmoid(-0.5 * beta * (model_diff - ref_diff)).mean()


# One graph for each shape and dtype; beyond the limit the rest would silently run in eager mode.
torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
torch._dynamo.config.fail_on_recompile_limit_hit = True
compiled_app_b2 = torch.compile(app_b2, dynamic=False)
_gradient_and_loss = torch.compile(torch.func.grad_and_value(app_b2), dynamic=False)


class _GradientInForward(torch.autograd.Function):
    """Liger's pattern for its preference losses: the compiled forward makes the gradient, backward scales it where needed."""

    @staticmethod
    def forward(ctx, model_pred, ref_pred, target):
        gradient, loss = _gradient_and_loss(model_pred, ref_pred, target)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        gradient, = ctx.saved_tensors
        if torch.ne(upstream, torch.tensor(1.0, device=upstream.device)):
            gradient = gradient * upstream
        return gradient, None, None


def liger_style(model_pred: Tensor, ref_pred: Tensor, target: Tensor) -> Tensor:
    return _GradientInForward.apply(model_pred, ref_pred, target)
