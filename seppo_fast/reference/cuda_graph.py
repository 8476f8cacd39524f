"""Capturing a step as a CUDA graph, and telling when a captured one no longer speaks of the module it was captured from."""

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

WARM_UP = 3  # as PyTorch's notes on CUDA graphs ask for: libraries allocate and choose their kernels in the first calls


def capture(warm_up: Callable[[], object], step: Callable[[], object], device: torch.device,
            pool: torch.cuda.MemPool) -> tuple[torch.cuda.CUDAGraph, float]:
    """`step` as a graph whose memory is in `pool`, and the seconds that it took.

    A graph is to be replayed on the stream that is current here, and no two of one pool at the same time. What PyTorch keeps
    about a capture is put right when one fails, so that everything goes on as before.
    """
    start = time.perf_counter()
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):  # restored when a capture fails, too
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
    """Memory for graphs. It must outlive them, and must not be dropped while one is captured: its end waits for the device."""
    with torch.cuda.device(device):
        return torch.cuda.MemPool()


@contextmanager
def _alone() -> Iterator[None]:
    """No video is decoded, and nothing is collected: what the collector frees may call what a capture forbids."""
    collects = gc.isenabled()
    with no_capture:
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def _unwind(graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool, users: int, stream: torch.cuda.Stream) -> None:
    """Take a capture that failed out of PyTorch's books, which its versions do in part only.

    Up to 2.11 the allocator goes on believing in it: nothing is freed any more, not even when memory runs out. Up to 2.13 the
    graph's share in the pool is never given back. Up to some version the random generator stays in capture, and ends it with
    the next one that succeeds.
    """
    _failed.append(graph)
    with suppress(RuntimeError):  # it has ended, where PyTorch saw to it
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool.id)
    graph.reset()
    while pool.use_count() > users:
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool.id)
    with suppress(RuntimeError):  # whatever is wrong with the device, the first error tells it
        number = torch.zeros(1, device=stream.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            number.zero_()


_failed: list[torch.cuda.CUDAGraph] = []  # 2.11 keeps their addresses, for pinned memory, and has no way to take them back


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream that it has seen, for good."""
    return torch.cuda.Stream(device)


class Same:
    """An object that equals itself alone; holding it keeps its address from being given to another."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


def fingerprint(module: nn.Module) -> tuple:
    """What a capture of `module` bakes in; where two differ, a graph from the one must not be replayed for the other.

    That is where each parameter and buffer lies, and every other attribute of every submodule: the attention processor,
    train or eval mode, which adapters are active and their scale, hooks. No value on the device is read.
    """
    tensors = [_place(tensor) for tensor in chain(module.parameters(), module.buffers())]
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
