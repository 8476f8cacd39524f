"""This machine's line in the plan: how fast its matrix products are, tried for a moment."""

import time
import warnings
from collections.abc import Callable, Sequence

import torch

from seppo_fast.errors import reason
from seppo_fast.machine import machine
from seppo_fast.planning.time_plan import Rate

Measure = Callable[[torch.device, torch.dtype], float]
SIDE = {"cpu": 512, "cuda": 8192}
TRIES = 3


def own_rate(known: Sequence[Rate], gpu: str, dtype: torch.dtype, measure: Measure | None = None) -> list[Rate]:
    """The rate of this machine's device: of the GPU with that name, or without one of the processor. Empty where it is known.

    Empty, too, where a GPU has no room for the trial, because another program uses it. `measure` is `matmul_tflops`.
    """
    about = machine()
    if any((gpu or about["cpu"]).startswith(rate.device) for rate in known):
        return []
    name = gpu or f"this machine's processor ({about['cpu']}, {about['threads']} thread{'s' * (about['threads'] > 1)})"
    kind = "cuda" if gpu else "cpu"
    tried = torch.float32 if kind == "cpu" and dtype == torch.float16 else dtype  # few processors compute in float16
    try:
        tflops = (measure or matmul_tflops)(torch.device(kind), tried)
    except RuntimeError as error:  # whatever the device refuses; a plan needs no memory on it
        warnings.warn(f"the plan has no line for this machine's {name}, which cannot be tried now: {reason(error)}", stacklevel=2)
        return []
    side = SIDE[kind]
    return [Rate(device=name, matmul_tflops=float(f"{tflops:.2g}"), source=f"its {side}x{side} matrix products were timed just now;"
                 " `python -m benchmarks.throughput --out DIR` measures all, for --rates")]


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the fastest of a few matrix products, after one to warm up."""
    side = SIDE[device.type]
    one = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for number in range(1 + TRIES):
        start = time.perf_counter()
        product = one @ one
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start) if number else best
    return 2 * side**3 / best / 1e12
