"""The sampler alone: images per second and the share of the device's matrix-product rate, ours beside diffusers at its best.

Diffusers' best is what its documentation on speed adds up to: `torch.compile` of the UNet as one graph (with CUDA graphs on a
GPU), channels_last, fused projections, and the pipeline called with embeddings for the whole batch, latents out. Ours is
`seppo_fast.reference.Sampler`. Same network, weights, DDIM, steps, guidance, batch, dtype and device.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from benchmarks.loop import Keep, Row
from benchmarks.networks import (
    SCHEDULE,
    conditions,
    counted_flops,
    denoise,
    latent_pipeline,
    latents,
    make_unet,
    own_flops,
)
from benchmarks.timing import waiter
from seppo_fast.config import Sampler as Settings
from seppo_fast.reference import Sampler, solver_table

GUIDANCE = 7.5
Draw = Callable[[], Tensor]
# (network, batch, steps), the most telling first: whatever ends the run leaves these
POINTS = {
    "cpu": [("quickstart", batch, 20) for batch in (64, 16, 4, 1)] + [("quickstart", 64, 50)],
    "cuda": [*(("sd15", batch, 50) for batch in (16, 64, 1, 32, 4, 8, 2)), ("sd15", 16, 20), ("sdxl", 8, 50), ("sdxl", 16, 50),
             ("sdxl", 1, 50)],
}
# How our sampler is set; the best of them at a point is what a user can have there.
WAYS = {"cpu": {"ours": {}}, "cuda": {"ours_graph": {}, "ours_graph_regional": {"compile": "regional"},
                                      "ours_eager": {"cuda_graph": False}}}


def matmul_rate(device: str, seconds: float = 2.0) -> float:
    """FLOP/s of the best square matrix product, bf16 on a GPU, fp32 on the CPU: the median of its repetitions."""
    dtype, sizes = (torch.bfloat16, (4096, 8192)) if device == "cuda" else (torch.float32, (1024, 2048))
    rates = []
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        times = repeat(lambda a=a, b=b: a @ b, device, seconds / len(sizes), least=5)
        rates.append(2 * size**3 / statistics.median(times))
    return max(rates)


def repeat(call: Callable[[], object], device: str, seconds: float, least: int = 2) -> list[float]:
    """Seconds of each of at least `least` calls, for about `seconds`; the first call is not counted."""
    wait = waiter(device)
    call()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < until:
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return times


def ours(name: str, batch: int, steps: int, device: str, **settings: object) -> Draw:
    """Our sampler on a network of its own."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    unet = make_unet(name, device, dtype).requires_grad_(False)
    if device == "cuda":
        unet.to(memory_format=torch.channels_last)
    table = solver_table(DDIMScheduler(**SCHEDULE).config, "ddim", steps).to(device)
    noise, given, unconditional = inputs(name, batch, device, dtype)
    sampler = Sampler(unet, denoise, table, unconditional,
                      Settings(solver="ddim", steps=steps, guidance_scale=GUIDANCE, batch_size=batch, **settings), dtype)
    return lambda: sampler.draw(noise, given)


def diffusers_best(name: str, batch: int, steps: int, device: str, compiled: bool = True) -> Draw:
    """The documented way to the best speed; `compiled` False for a comparison of the samples themselves."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    unet = make_unet(name, device, dtype).requires_grad_(False)
    if compiled:
        unet.to(memory_format=torch.channels_last)
        unet.fuse_qkv_projections()
        unet.compile(fullgraph=True, dynamic=False, mode="reduce-overhead" if device == "cuda" else "default")
    draw = latent_pipeline(name, unet)
    noise, given, unconditional = inputs(name, batch, device, dtype)
    return torch.no_grad()(lambda: draw(noise.to(dtype), given, unconditional, steps, GUIDANCE))


def inputs(name: str, batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Noise, conditions and unconditional ones: the same at every call."""
    torch.manual_seed(1)
    return latents(name, batch, device), conditions(name, batch, device, dtype), conditions(name, 1, device, dtype)


def difference(name: str, device: str, steps: int = 5) -> float:
    """The largest difference between our samples and diffusers' from the same noise, in units of their standard deviation."""
    mine, theirs = ours(name, 2, steps, device)(), diffusers_best(name, 2, steps, device, compiled=False)()
    return ((mine.float() - theirs.float()).abs().max() / theirs.float().std()).item()


def measure(device: str, keep: Keep, seconds: float, repeats: float = 3.0, points: Sequence[tuple[str, int, int]] | None = None,
            compiled_baseline: bool = True) -> None:
    """Rows by point, until `seconds` have passed; the baseline compiles anew at each batch, which takes most of the time."""
    until = time.perf_counter() + seconds
    points = POINTS[device] if points is None else points
    result: Row = {"matmul_tflops": round(matmul_rate(device) / 1e12, 3), "guidance": GUIDANCE, "flops": {}, "difference": {},
                   "not_reached": []}
    rows: list[Row] = []
    for name, batch, steps in points:
        if time.perf_counter() > until:
            result["not_reached"].append(f"{name} batch {batch}, {steps} steps")
            continue
        if name not in result["flops"]:
            result["flops"][name] = {"own": own_flops(name), "torch_flop_counter": counted_flops(name)}
            result["difference"][name] = round(difference(name, device), 5)
        for way in (*WAYS[device], "diffusers"):
            make = partial(diffusers_best, name, batch, steps, device, compiled_baseline) if way == "diffusers" else \
                partial(ours, name, batch, steps, device, **WAYS[device][way])
            row: Row = {"network": name, "batch": batch, "steps": steps, "way": way}
            rows.append(row | time_draw(make, device, repeats, batch, 2 * steps * result["flops"][name]["own"],
                                        1e12 * result["matmul_tflops"]))
            print(rows[-1], flush=True)
            keep(result | {"ratios": ratios(rows), "rows": rows})
            if device == "cuda":
                torch.compiler.reset()
                torch.cuda.empty_cache()
    keep(result | {"ratios": ratios(rows), "rows": rows})


def time_draw(make: Callable[[], Draw], device: str, seconds: float, batch: int, flops: float, rate: float) -> Row:
    """Images per second and share of the matrix-product rate; `first_s`: the first draw, captures and compilation included."""
    wait = waiter(device)
    try:
        draw = make()
        start = time.perf_counter()
        draw()
        wait()
        first = time.perf_counter() - start
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = statistics.median(repeat(draw, device, seconds))
    except (torch.OutOfMemoryError, RuntimeError) as error:  # one way that does not work here leaves the others
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    peak = {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if device == "cuda" else {}
    return {"images_per_s": round(batch / took, 4), "of_matmul": round(batch * flops / took / rate, 4),
            "first_s": round(first, 2), "draw_s": round(took, 4), **peak}


def ratios(rows: Sequence[Row]) -> list[Row]:
    """Of each point: our best way, and its images per second over diffusers'."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if "images_per_s" in row:
            found.setdefault((row["network"], row["batch"], row["steps"]), {})[row["way"]] = row
    result = []
    for (network, batch, steps), ways in found.items():
        mine = [row for way, row in ways.items() if way != "diffusers"]
        if not mine:
            continue
        best = max(mine, key=lambda row: row["images_per_s"])
        row = {"network": network, "batch": batch, "steps": steps, "best": best["way"], "images_per_s": best["images_per_s"],
               "of_matmul": best["of_matmul"]}
        if "diffusers" in ways:
            row["over_diffusers"] = round(best["images_per_s"] / ways["diffusers"]["images_per_s"], 3)
        result.append(row)
    return result
