"""The sampler alone: images per second and the share of the device's matrix-product rate, ours beside diffusers at its best.

Diffusers at its best is all that its documentation on speed recommends: `torch.compile` of the UNet as one graph (with CUDA
graphs on a GPU), channels_last, fused projections, and the pipeline called with embeddings for the whole batch, latents out. Ours
is `seppo_fast.reference.Sampler`. Both have the same network, weights, solver (DDIM), steps, guidance, batch, dtype and device.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import diffusers
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from benchmarks.networks import (
    conditions,
    counted_flops,
    denoise,
    latent_pipeline,
    latents,
    make_unet,
    own_flops,
    schedule,
)
from benchmarks.result_files import Keep, Row
from benchmarks.throughput.ways import Way
from benchmarks.timing import alternated, in_turn
from seppo_fast.config import Sampler as Settings
from seppo_fast.models.layout import convolve_in_channels_last
from seppo_fast.profiling.report import operator_table, operators
from seppo_fast.reference import Sampler, classifier_free, solver_table

GUIDANCE = 7.5
LEAST = {"cpu": 5, "cuda": 2}  # draws of each way at each point; on the CPU, medians of two differ by a tenth
Draw = Callable[[], Tensor]
# Settings of our sampler by name. At each point the best of them counts: it is what a user can have there.
OURS = {"ours": {}, "ours_regional": {"compile": "regional"}, "ours_full": {"compile": "full", "fuse_projections": True},
        "ours_eager": {"cuda_graph": False}}
DIFFUSERS, EAGER = "diffusers", "diffusers_eager"
Point = tuple[str, int, int, tuple[str, ...]]  # network, batch, steps, ways
# The most important come first, for a run that is cut short. Each compiled way compiles for about a minute for each batch.
POINTS: dict[str, list[Point]] = {
    "cpu": [*(("quickstart", batch, 20, ("ours", EAGER)) for batch in (64, 32, 16, 8, 4, 2, 1)),
            ("quickstart", 64, 50, ("ours", EAGER)),
            ("quickstart", 64, 20, ("ours", EAGER, "ours_regional", "ours_full", DIFFUSERS))],
    "cuda": [("sd15", 16, 20, ("ours", DIFFUSERS)), ("sd15", 64, 50, ("ours",)),
             ("sd15", 16, 50, ("ours", "ours_regional", EAGER, DIFFUSERS)),
             ("animatediff", 4, 25, ("ours", "ours_regional", EAGER)), *(("animatediff", batch, 25, ("ours",)) for batch in (1, 8)),
             *(("sd15", batch, 50, ("ours",)) for batch in (1, 32, 8, 4, 2)),
             ("sd15", 64, 50, ("ours", "ours_regional", DIFFUSERS)), ("sdxl", 8, 50, ("ours", EAGER)),
             ("sd15", 1, 50, ("ours", "ours_regional", EAGER, DIFFUSERS)), ("sdxl", 8, 50, ("ours", "ours_regional", DIFFUSERS)),
             ("sd15", 16, 50, ("ours", "ours_eager")), *(("sdxl", batch, 50, ("ours",)) for batch in (1, 16, 32))],
}


def matmul_rate(device: str, seconds: float) -> float:
    """FLOP/s of the best square matrix product, bf16 on a GPU, fp32 on the CPU: the median of its repetitions."""
    dtype, sizes = (torch.bfloat16, (4096, 8192)) if device == "cuda" else (torch.float32, (512, 1024))
    products = {str(size): partial(torch.mm, *(torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)))
                for size in sizes}
    times = in_turn({size: lambda _, product=product: product() for size, product in products.items()}, seconds, device=device)
    return max(2 * int(size)**3 / (statistics.median(took) / 1e6) for size, took in times.items())


def ours(name: str, batch: int, steps: int, device: str, **settings: object) -> Draw:
    """Our sampler on a network of its own, in channels_last as the trainer has it."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    unet = make_unet(name, device, dtype).requires_grad_(False)
    if device == "cuda":
        convolve_in_channels_last(unet)
    table = solver_table(DDIMScheduler(**schedule(name)).config, "ddim", steps).to(device)
    noise, given, unconditional = inputs(name, batch, device, dtype)
    sampler = Sampler(unet, denoise, table, unconditional, classifier_free(GUIDANCE, unconditional),
                      Settings(solver="ddim", steps=steps, guidance_scale=GUIDANCE, batch_size=batch, **settings), dtype)
    return lambda: sampler.draw(noise, given)


def theirs(name: str, batch: int, steps: int, device: str, compiled: bool) -> Draw:
    """diffusers' pipeline; `compiled`: with all that its documentation recommends for speed."""
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
    """Noise, conditions and unconditional conditions, the same in every call."""
    torch.manual_seed(1)
    return latents(name, batch, device), conditions(name, batch, device, dtype), conditions(name, 1, device, dtype)


def difference(name: str, device: str, steps: int = 5) -> float:
    """The largest difference between our samples and diffusers' from the same noise, in units of their standard deviation."""
    mine, other = ours(name, 2, steps, device)(), theirs(name, 2, steps, device, compiled=False)()
    return ((mine.float() - other.float()).abs().max() / other.float().std()).item()


def measure(device: str, keep: Keep, seconds: float, repeats: float = 2.0, points: Sequence[Point] | None = None) -> None:
    """Store a row for each point and way. The ways of a point are timed in turn, `repeats` seconds each, as are matrix products.

    No point is begun after `seconds`. Each way has a process of its own. Results are stored after each way's first draw and
    after each point.
    """
    until = time.perf_counter() + seconds
    result: Row = {"matmul_tflops": round(matmul_rate(device, repeats) / 1e12, 4), "guidance": GUIDANCE, "flops": {},
                   "difference": {}, "not_reached": []}
    rows: list[Row] = []
    ways: dict[str, Way] = {}
    try:
        for name, batch, steps, wanted in POINTS[device] if points is None else points:
            if time.perf_counter() > until:
                result["not_reached"].append(f"{name} batch {batch}, {steps} steps: {', '.join(wanted)}")
                continue
            if name not in result["flops"]:
                result["flops"][name] = {"own": own_flops(name), "torch_flop_counter": counted_flops(name)}
                result["difference"][name] = float(f"{difference(name, device):.2g}")
            point = [{"network": name, "batch": batch, "steps": steps, "way": way} for way in wanted]
            for row in point:
                way = ways.setdefault(row["way"], Way(device))
                row |= way.open(partial(open_way, row["way"], name, batch, steps, device))
                keep(result | {"ratios": ratios(rows), "rows": rows + point})
            tflop = 2 * steps * batch * result["flops"][name]["own"] / 1e12
            working = [row for row in point if "failed" not in row]
            times = alternated({row["way"]: ways[row["way"]].draw for row in working}, repeats * len(working),
                               least=LEAST[device])
            for row in working:
                took = statistics.median(times[row["way"]])
                row |= {"images_per_s": round(batch / took, 4), "of_matmul": round(tflop / took / result["matmul_tflops"], 4),
                        "draw_s": round(took, 4), "draws": len(times[row["way"]])}
            rows += point
            print(*point, sep="\n", flush=True)
            keep(result | {"ratios": ratios(rows), "rows": rows})
            for way in wanted:
                ways[way].close()
    finally:
        for way in ways.values():
            way.end()
    keep(result | {"ratios": ratios(rows), "rows": rows})


def open_way(way: str, name: str, batch: int, steps: int, device: str) -> Draw:
    """What draws in this way, by its name: our sampler or diffusers'."""
    diffusers.utils.logging.set_verbosity_error()
    if way in OURS:
        return ours(name, batch, steps, device, **OURS[way])
    return theirs(name, batch, steps, device, compiled=way == DIFFUSERS)


def ratios(rows: Sequence[Row]) -> list[Row]:
    """For each point our best way, and its images per second over those of diffusers, compiled and as it is."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if "images_per_s" in row:
            found.setdefault((row["network"], row["batch"], row["steps"]), {})[row["way"]] = row
    result = []
    for (network, batch, steps), ways in found.items():
        mine = [row for way, row in ways.items() if way in OURS]
        if not mine:
            continue
        best = max(mine, key=lambda row: row["images_per_s"])
        row = {"network": network, "batch": batch, "steps": steps, "best": best["way"],
               **{key: best[key] for key in ("images_per_s", "of_matmul", "first_s", "draw_s")}}
        result.append(row | {f"over_{way}": round(best["images_per_s"] / ways[way]["images_per_s"], 3)
                             for way in (DIFFUSERS, EAGER) if way in ways})
    return result


def profile(device: str) -> str:
    """The operators of one draw, ours and diffusers'."""
    name, batch, steps = ("sd15", 16, 10) if device == "cuda" else ("quickstart", 64, 10)
    tables = []
    for who, make in (("ours", ours), ("diffusers, not compiled", partial(theirs, compiled=False))):
        draw = make(name, batch, steps, device)
        draw()
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
            draw()
            if device == "cuda":
                torch.cuda.synchronize()
        tables.append(operator_table(operators(profiler, device), f"{who}: {name}, batch {batch}, {steps} guided steps"))
    return "\n\n".join(tables)
