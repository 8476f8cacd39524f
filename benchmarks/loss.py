"""Times the loss: `python -m benchmarks.loss --out benchmarks/results`. Writes loss_<device>.json and .csv.

Every implementation is called in turn, on buffers that rotate through more memory than the caches hold, and the median
is kept. `copy` copies 2 N elements, N being those of model_pred: it reads 2 N and writes 2 N, the 4 N that the loss
cannot do without (three tensors read, one written). Host time is that of tensors too small to matter.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import loss_baselines
from seppo_fast.ops import available_backends, seppo_loss

SHAPES = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128), "video": (4, 16, 32, 32), "sd3_1024": (16, 128, 128)}
CASES = [*(("sd15", pairs) for pairs in (2, 4, 8, 16, 32, 64)), ("sdxl", 2), ("sdxl", 8), ("video", 2), ("video", 8),
         ("sd3_1024", 2)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROTATE_BYTES = 256 << 20
Case = list[Tensor]


def losses(device: str) -> dict[str, Callable[..., Tensor]]:
    """Name -> function of (model_pred, ref_pred, target); fused backends as far as they run here."""
    found = {"eager": loss_baselines.app_b2, "compile": loss_baselines.compiled_app_b2,
             "liger_style": loss_baselines.liger_style}
    for backend in ("native", "triton"):
        if available_backends(device)[backend] == "available":
            found[backend] = lambda p, r, t, backend=backend: seppo_loss(p, r, t, backend=backend)
            found[f"{backend}_grad_scale"] = lambda p, r, t, backend=backend: seppo_loss(p, r, t, backend=backend, grad_scale=1.0)
    return found


def make_case(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    target = torch.randn(shape, device=device)
    ref_pred = target + 0.3 * torch.randn_like(target)
    model_pred = ref_pred + 0.01 * torch.randn_like(target)
    return [model_pred.to(dtype).requires_grad_(), ref_pred.to(dtype), target.to(dtype)]


def forward_backward(function: Callable[..., Tensor], case: Case) -> None:
    torch.autograd.grad(function(*case), case[0])


def in_turn(calls: dict[str, Callable[[int], object]], seconds: float, block: int = 3) -> dict[str, list[float]]:
    """Microseconds of each call, `block` calls of one after another.

    The first call of each block is not counted: it pays for the code and the threads that the one before it left cold. Nor
    are the first two turns.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    turn, until = 0, 0.0
    while turn < 12 or time.perf_counter() < until:
        for name, call in calls.items():
            call(turn * (block + 1))
            for index in range(block):
                start = time.perf_counter()
                call(turn * (block + 1) + index + 1)
                times[name].append(1e6 * (time.perf_counter() - start))
        turn += 1
        if turn == 2:  # compiled, and threads started
            times = {name: [] for name in calls}
            until = time.perf_counter() + seconds
    return times


def rows_of(labels: dict[str, object], times: dict[str, list[float]]) -> list[dict[str, object]]:
    return [labels | {"implementation": name, "median_us": round(statistics.median(values), 2),
                      "p10_us": round(statistics.quantiles(values, n=10)[0], 2), "calls": len(values)}
            for name, values in times.items()]


def measure_case(shape_name: str, pairs: int, dtype_name: str, device: str, seconds: float) -> list[dict[str, object]]:
    dtype, shape = DTYPES[dtype_name], (2 * pairs, *SHAPES[shape_name])
    elements = 2 * pairs * torch.Size(SHAPES[shape_name]).numel()
    copies = min(64, max(2, ROTATE_BYTES // (4 * elements * dtype.itemsize)))
    cases = [make_case(shape, dtype, device) for _ in range(copies)]
    sources = [torch.randn(2 * elements, device=device).to(dtype) for _ in range(copies)]
    targets = [torch.empty_like(source) for source in sources]
    functions = losses(device)
    labels = {"shape": shape_name, "pairs": pairs, "dtype": dtype_name, "floor_bytes": 4 * elements * dtype.itemsize}
    both = {name: (lambda i, f=f: forward_backward(f, cases[i % copies])) for name, f in functions.items()}
    both["copy"] = lambda i: targets[i % copies].copy_(sources[i % copies])
    only = {name: (lambda i, f=f: f(*cases[i % copies])) for name, f in functions.items()}
    return (rows_of(labels | {"what": "forward_backward"}, in_turn(both, seconds))
            + rows_of(labels | {"what": "forward"}, in_turn(only, seconds / 3)))


def measure_host(device: str, seconds: float) -> list[dict[str, object]]:
    cases = {"1 pair": make_case((2, 4, 1, 1), torch.float32, device), "2 pairs": make_case((4, 4, 1, 1), torch.float32, device)}
    rows = []
    for pairs, case in enumerate(cases.values(), start=1):
        calls = {name: (lambda _, f=f, case=case: forward_backward(f, case)) for name, f in losses(device).items()}
        labels = {"shape": "tiny", "pairs": pairs, "dtype": "fp32", "floor_bytes": 0, "what": "host"}
        rows += rows_of(labels, in_turn(calls, seconds, block=50))
    return rows


def ratios(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Of each case: times in units of the native (or triton) backend's, and that backend's in units of the copy's.

    From the medians and, with "p10", from the tenth percentiles: on a machine shared with others these are the better guess.
    """
    found: dict[tuple, dict[str, dict[str, float]]] = {}
    for row in rows:
        found.setdefault((row["what"], row["shape"], row["pairs"], row["dtype"]), {})[row["implementation"]] = row
    out = []
    for (what, shape, pairs, dtype), times in found.items():
        fused = next((times[name] for name in ("native", "triton") if name in times), None)
        if fused is None:
            continue
        ratio = {"what": what, "shape": shape, "pairs": pairs, "dtype": dtype}
        for statistic, suffix in (("median_us", ""), ("p10_us", "_p10")):
            for name in ("eager", "compile", "liger_style"):
                ratio[f"{name}_over_fused{suffix}"] = round(times[name][statistic] / fused[statistic], 2)
            if "copy" in times:
                ratio[f"fused_over_copy{suffix}"] = round(fused[statistic] / times["copy"][statistic], 2)
        out.append(ratio)
    return out


def machine(device: str) -> dict[str, object]:
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    flags = Path("/proc/cpuinfo").read_text()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "avx512": "avx512bw" in flags,
            "load_average": os.getloadavg()[0], "device": device if device == "cpu" else torch.cuda.get_device_name(device)}


def commit() -> str:
    """The commit, with "+" when the tree has changes; empty outside a checkout."""
    run = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"], capture_output=True,
                         text=True, cwd=Path(__file__).parent, check=False)
    return run.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case (forward + backward)")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many shapes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    torch._dynamo.config.cache_size_limit = 64  # one graph for each case
    result: dict[str, object] = {
        "machine": machine("cpu"), "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()}, "backends": available_backends("cpu")}
    rows = measure_host("cpu", arguments.seconds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for shape_name, pairs in CASES[:arguments.cases]:
        for dtype_name in DTYPES:
            rows += measure_case(shape_name, pairs, dtype_name, "cpu", arguments.seconds)
            print(ratios(rows)[-2], flush=True)
            # after every case, so that a run cut short leaves what it had
            text = json.dumps(result | {"ratios": ratios(rows), "rows": rows}, indent=1)
            (arguments.out / "loss_cpu.json").write_text(text + "\n")
    with (arguments.out / "loss_cpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in ratios(rows):
        if row["what"] == "host":
            print(row)


if __name__ == "__main__":
    main()
