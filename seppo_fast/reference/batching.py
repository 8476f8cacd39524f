"""How many samples a batch holds, and how samples are put into batches."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from seppo_fast.errors import reason
from seppo_fast.meter import Meter

Item = TypeVar("Item")

LARGEST = 64  # the network's kernels reach their full speed at smaller batches
PAYS = 1.05  # doubling the batch must give this many times the samples a second
SHARE = 0.5  # of the memory that is free at the time; the training step needs the rest


def even(count: int, most: int) -> int:
    """The batch size that puts `count` samples into as few batches as possible, none larger than `most`."""
    return -(-count // -(-count // most))


def chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive runs of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def padded(value: Tensor, size: int) -> Tensor:
    """`value` (n, ...) with its last row repeated up to `size` rows."""
    return value if len(value) == size else torch.cat([value, value[-1:].expand(size - len(value), *value.shape[1:])])


def measured_size(step_of: Callable[[int], Callable[[], None]], wanted: int, device: torch.device,
                  free: Callable[[torch.device], int] | None = None) -> tuple[int, str]:
    """The batch size, at most `wanted`, from which doubling stops paying or no longer fits, and why it was chosen.

    `step_of(size)` allocates a batch and returns one step of its loop; `free(device)` is the memory left in bytes.
    """
    allowed = SHARE * (free or free_memory)(device)
    size, rate, most = 1, 0.0, min(wanted, LARGEST)
    best = 1
    while True:
        try:
            with peak(device) as used:
                step = step_of(size)
                step()
            per_second = size / min(seconds(step, device) for _ in range(2))
            del step
        except torch.OutOfMemoryError:
            return best, f"{size} do not fit into memory"
        except RuntimeError as error:
            if size == 1 or not _launch_failed(error):
                raise
            return best, f"{size} are more than a kernel can be launched for ({reason(error)})"
        if per_second < PAYS * rate:
            return best, f"{size} give no more samples a second"
        best, rate = size, per_second
        if size == most:
            return best, "no more are wanted" if most == wanted else f"{LARGEST} are the most that is tried"
        larger = min(2 * size, most)
        if used() * larger / size > allowed:
            return best, f"{larger} need more than {SHARE:.0%} of the free memory ({allowed / SHARE / 1e9:.2f} GB)"
        size = larger


def _launch_failed(error: Exception) -> bool:
    """Whether a kernel was refused before it ran, for its grid or its blocks' needs. Smaller batches can still run then.

    Other errors, of kernels that ran, leave the process without its device.
    """
    return any(words in str(error) for words in ("invalid configuration argument", "too many resources requested for launch"))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's, kept for its next tensors
    return torch.cuda.mem_get_info(device)[0] + unused


@contextmanager
def peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the most bytes that were allocated at once in the block."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with Meter() as meter:
        yield lambda: meter.peak


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long `call` takes, including the work that it starts on `device`."""
    _synchronise(device)
    start = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
