"""Bytes alive and FLOPs of a network's run, counted on the meta device: nothing is computed and nothing is allocated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from seppo_fast.meter import Meter


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention on the meta device without the matrix of scores, like the fused kernels of real devices.

    PyTorch itself would compute its formula step by step there, and keep that matrix for backward.
    """
    real = functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = real


def inference(run: Callable[[], Any]) -> Meter:
    """The cost of `run` without gradients."""
    with Meter() as meter, fused_attention(), torch.no_grad():
        run()
    return meter


def micro_batch(policy: nn.Module, run: Callable[[], Tensor], *, reference: bool, gradient: Callable[[nn.Parameter], None],
                finish: Callable[[], None] = lambda: None) -> Meter:
    """The cost of a micro-batch: `run`, `reference` (the same again, without gradients), and the backward.

    `gradient(weight)` takes each weight's gradient when it appears, as the engine does; `finish()` is called after the last.
    """
    hooks = [weight.register_post_accumulate_grad_hook(gradient) for weight in policy.parameters() if weight.requires_grad]
    with Meter() as meter, fused_attention():
        prediction = run()
        if reference:
            with torch.no_grad():
                run()
        prediction.backward(torch.empty_like(prediction))
        finish()
    for hook in hooks:
        hook.remove()
    return meter
