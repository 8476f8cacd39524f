"""Bytes alive and FLOPs of a network's run, followed on the meta device: nothing is computed and nothing is allocated."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages born under it until they die, `now` and `peak`, and `flops`.

    Kernels' own workspaces and the allocator's rounding are not seen. A storage's finalizer is a weak reference, as in
    PyTorch's own `torch.distributed._tools.mem_tracker`; its `FlopCounterMode` would keep tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {id(tensor.untyped_storage()) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:  # not a view, nor in place
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def died(_: weakref.ref) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention on the meta device as the fused kernels of every real device do it: without the matrix of scores.

    There PyTorch would take its formula apart, and keep that matrix for backward.
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
    """What `run` takes without gradients."""
    with Meter() as meter, fused_attention(), torch.no_grad():
        run()
    return meter


def micro_batch(policy: nn.Module, run: Callable[[], Tensor], *, reference: bool, gradient: Callable[[nn.Parameter], None],
                finish: Callable[[], None] = lambda: None) -> Meter:
    """What a micro-batch takes: `run`, `reference` (the same again, without gradients), and the backward.

    `gradient(weight)` takes each weight's gradient as the engine does, when it appears, and `finish()` follows on the last.
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
