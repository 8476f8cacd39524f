"""What is measured of the loss: shapes, dtypes, implementations, and inputs that no cache holds."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.loss import baselines
from benchmarks.loss.summary import FUSED
from seppo_fast.ops import available_backends, seppo_loss

SHAPES = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128), "video": (4, 16, 32, 32), "sd3_1024": (16, 128, 128)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Case = list[Tensor]


def losses(device: str) -> dict[str, Callable[..., Tensor]]:
    """Name -> function of (model_pred, ref_pred, target); with the fused backends that run here."""
    found: dict[str, Callable[..., Tensor]] = {
        "eager": baselines.app_b2, "compile": baselines.compiled_app_b2, "liger_style": baselines.liger_style}
    for backend in FUSED:
        if available_backends(device)[backend] == "available":
            found[backend] = partial(seppo_loss, backend=backend)
            found[f"{backend}_grad_scale"] = partial(seppo_loss, backend=backend, grad_scale=1.0)
    return found


def forward_backward(function: Callable[..., Tensor], case: Case) -> None:
    torch.autograd.grad(function(*case), case[0])


def make_case(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    target = torch.randn(shape, device=device)
    ref_pred = target + 0.3 * torch.randn_like(target)
    model_pred = ref_pred + 0.01 * torch.randn_like(target)
    return [model_pred.to(dtype).requires_grad_(), ref_pred.to(dtype), target.to(dtype)]


def floor_bytes(shape: str, pairs: int, dtype: torch.dtype) -> int:
    """Bytes that the loss cannot do without, 4 N elements: three tensors read, one written."""
    return 4 * 2 * pairs * torch.Size(SHAPES[shape]).numel() * dtype.itemsize


def sets(rotate: int, each: int) -> int:
    """How many buffers of `each` bytes it takes to rotate through `rotate` bytes."""
    return max(2, -(-rotate // each))


def rotating_cases(shape: str, pairs: int, dtype: torch.dtype, device: str, count: int) -> list[Case]:
    """`count` copies of one set of inputs; no two tensors share memory."""
    first = make_case((2 * pairs, *SHAPES[shape]), dtype, device)
    return [first, *([x.detach().clone().requires_grad_(x.requires_grad) for x in first] for _ in range(count - 1))]


def rotating_copies(floor: int, dtype: torch.dtype, device: str, count: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs (to, from) of 2 N elements: one copy reads and writes `floor` bytes. All of the memory has been written once."""
    source = torch.ones(floor // 2 // dtype.itemsize, dtype=dtype, device=device)
    return [(source.clone(), source.clone()) for _ in range(count)]


def needed_bytes(shape: str, pairs: int, dtype: torch.dtype, rotate: int) -> int:
    """Bytes of memory that a case takes: inputs, copies, and the temporaries of eager (10 N elements in bf16, 5 N in fp32)."""
    floor = floor_bytes(shape, pairs, dtype)
    inputs = 3 * floor // 4
    return sets(rotate, inputs) * inputs + sets(rotate, floor) * floor + 3 * floor
