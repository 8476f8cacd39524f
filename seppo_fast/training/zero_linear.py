"""ZeRO-3 replaces `torch.nn.functional.linear` for the whole process, for good: what computes linear layers in a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from torch import Tensor
from torch.nn import functional

Linear = Callable[..., Tensor]


def plain() -> Linear:
    """PyTorch's own function."""
    return getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", functional.linear)


def restore_linear() -> None:
    """Undo what an earlier run of this process with ZeRO-3 has replaced: its function keeps the inputs of frozen layers, too."""
    functional.linear = plain()


@contextmanager
def linear_of(zero: dict[str, Any]) -> Iterator[None]:
    """Linear layers computed as in a run with this "zero_optimization" section, whatever ran in this process before."""
    before = functional.linear
    partitions = int(zero.get("stage", 0)) == 3 and zero.get("memory_efficient_linear", True)
    functional.linear = zero3_linear_wrap if partitions else plain()
    try:
        yield
    finally:
        functional.linear = before
