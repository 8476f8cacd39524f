"""The machine at hand in the plan: how fast its matrix products are, tried for a moment."""

import time
from collections.abc import Sequence

import torch

from seppo_fast.machine import machine
from seppo_fast.planning.time_plan import Rate

SIDE = {"cpu": 512, "cuda": 8192}
TRIES = 3


def own_rate(known: Sequence[Rate], gpu: str, dtype: torch.dtype) -> list[Rate]:
    """The rate of this machine's device, the GPU of that name or without one the processor; empty where it is known."""
    about = machine()
    if any((gpu or about["cpu"]).startswith(rate.device) for rate in known):
        return []
    name = gpu or f"this machine's processor ({about['cpu']}, {about['threads']} thread{'s' * (about['threads'] > 1)})"
    kind = "cuda" if gpu else "cpu"
    tflops = matmul_tflops(torch.device(kind), dtype if gpu or dtype != torch.float16 else torch.float32)
    side = SIDE[kind]
    return [Rate(device=name, matmul_tflops=float(f"{tflops:.2g}"), source=f"its {side}x{side} matrix products were timed just now;"
                 " `python -m benchmarks.throughput --out DIR` measures all, for --rates")]


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the best of a few matrix products, after one to warm up."""
    side = SIDE[device.type]
    one = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for number in range(1 + TRIES):
        start = time.perf_counter()
        product = one @ one
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start) if number else best
    return 2 * side**3 / best / 1e12
