"""Capturing a step as a CUDA graph, and finding out whether a captured graph still fits its module."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from seppo_fast.capturing import no_capture
from seppo_fast.models.quantize import parts

WARM_UP = 3  # as PyTorch's notes on CUDA graphs say: libraries allocate and choose kernels in their first calls


def capture(warm_up: Callable[[], object], step: Callable[[], object], device: torch.device,
            pool: torch.cuda.MemPool) -> tuple[torch.cuda.CUDAGraph, float]:
    """`step` as a graph whose memory is in `pool`, and the seconds that the capture took.

    Replay a graph on the stream that is current here, and never two of one pool at the same time. When a capture fails,
    PyTorch's records of it are repaired, so that everything works as before.
    """
    start = time.perf_counter()
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):  # restored also when a capture fails
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        graph, users = torch.cuda.CUDAGraph(), pool.use_count()
        with _alone():
            try:
                # thread_local: another thread may be copying the next micro-batch to the device
                with torch.cuda.graph(graph, pool=pool.id,  # type: ignore[arg-type]  # what torch itself hands out
                                      stream=stream, capture_error_mode="thread_local"):
                    step()
            except BaseException:
                _unwind(graph, pool, users, stream)
                raise
    return graph, time.perf_counter() - start


def new_pool(device: torch.device) -> torch.cuda.MemPool:
    """Memory for graphs. It must live longer than they do. Do not free it during a capture: freeing waits for the device."""
    with torch.cuda.device(device):
        return torch.cuda.MemPool()


@contextmanager
def _alone() -> Iterator[None]:
    """Within the block no video is decoded and no garbage collected: what is freed may call functions that a capture forbids."""
    collects = gc.isenabled()
    with no_capture:
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def _unwind(graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool, users: int, stream: torch.cuda.Stream) -> None:
    """Remove a failed capture from PyTorch's records, which PyTorch itself does only in part.

    Up to 2.11 the allocator believes that the capture goes on: it frees nothing any more, even when memory runs out. Up to 2.13
    the graph's share of the pool is never released. Up to some version the random generator stays in capture mode until the next
    capture succeeds.
    """
    _failed.append(graph)
    with suppress(RuntimeError):  # where PyTorch has ended it already
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool.id)
    graph.reset()
    while pool.use_count() > users:
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool.id)
    with suppress(RuntimeError):  # an error of the device itself is in the first exception
        number = torch.zeros(1, device=stream.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            number.zero_()


_failed: list[torch.cuda.CUDAGraph] = []  # 2.11 keeps their addresses for pinned memory, with no way to remove them


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Same:
    """Equal only where it holds the same object; as long as it holds the object, no other gets its address."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


def fingerprint(module: nn.Module) -> tuple:
    """What a capture of `module` depends on: a graph must not be replayed when the fingerprint has changed.

    It holds the address of each parameter and buffer, and every other attribute of every submodule: the attention processor,
    train or eval mode, active adapters and their scale, hooks. No value on the device is read.
    """
    tensors = [_place(part) for tensor in chain(module.parameters(), module.buffers()) for part in parts(tensor)]
    attributes = [(type(part), *(_frozen(value) for name, value in vars(part).items() if name not in _COVERED))
                  for part in module.modules()]
    return (*tensors, *attributes)


_COVERED = ("_parameters", "_buffers", "_modules")


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _frozen(value: Any) -> Any:
    """`value` as it is now, comparable: lists and dictionaries change in place."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return _place(value)
    if isinstance(value, dict):
        return tuple((_frozen(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(map(_frozen, value))
    return Same(value)
