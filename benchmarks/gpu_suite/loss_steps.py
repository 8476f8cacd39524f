"""The steps of the GPU suite that measure the loss. Each takes `keep`, which stores the results so far.

Times on the device are those of CUDA graphs of many calls. The buffers of the calls together are larger than the L2 cache, so that
these times contain neither the host nor the cache. Times of a call are those of loops that wait for the device at both ends.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.loss.cases import DTYPES, SHAPES, Case, floor_bytes, forward_backward, losses, make_case, rotating_cases
from benchmarks.result_files import Keep, Row
from benchmarks.timing import Calls, first_calls, in_turn, peak_bytes
from seppo_fast.ops import available_backends, per_sample_mse, seppo_loss

CASES = [("sd15", 1), ("sd15", 8), ("sd15", 64), ("sd15", 256), ("sd15", 1024), ("sdxl", 1), ("sdxl", 16), ("sdxl", 256),
         ("video", 1), ("video", 16), ("video", 256), ("sd3_1024", 1), ("sd3_1024", 64)]
ROTATE_BYTES = 512 << 20
OPTIONS = (2000.0, 0, 0.0, 1.0, 1.0, True)  # beta, flipper, sft_weight, scale, weight, wants_grad of the operators
CLUSTERED, COOPERATIVE, IN_PASSES = 1, 2, 3  # enum Plan of csrc/cuda.cu


def headline(result: Row) -> str:
    """The part of a step's result that is printed."""
    return str({key: result[key] for key in ("ok", "tests", "failures", "best", "targets") if key in result} or "")


def fused_backends() -> list[str]:
    return [name for name in ("native", "triton") if available_backends("cuda")[name] == "available"]


def buffers(shape: str, pairs: int, dtype: torch.dtype) -> tuple[list[Case], int]:
    """Sets of inputs, together larger than L2 (48 at most, so small ones stay in it), and the bytes that a call has to move."""
    floor = floor_bytes(shape, pairs, dtype)
    return rotating_cases(shape, pairs, dtype, "cuda", min(48, max(2, ROTATE_BYTES // floor))), floor


def on_device(call: Callable[[int], object], calls: int, repeats: int = 7) -> float:
    """Median microseconds of one of `calls` different calls, replayed in one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(index) for index in range(calls)]
    times = []
    for _ in range(2 + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    del kept
    return statistics.median(times[2:])


def medians(calls: Calls, seconds: float, together: int) -> dict[str, float]:
    """Median microseconds a call, the host's work included, of `together` calls in a row."""
    times = in_turn(calls, seconds, block=1, together=together, device="cuda")
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def one_call(backend: str, case: list[Tensor]) -> tuple[Tensor, ...]:
    """The operator itself, forward and gradient, for the time on the device."""
    if backend == "native":
        return torch.ops.seppo_fast.pair_loss(*case, *OPTIONS)
    from seppo_fast.ops import triton_kernel
    return triton_kernel.pair_loss(*case, *OPTIONS)


def bandwidth(keep: Keep) -> None:
    """Store the bandwidth of the 4 N bytes that the loss has to move, also as a share of a copy's of the same bytes."""
    rows = []
    for dtype_name, dtype in DTYPES.items():
        for shape, pairs in CASES:
            cases, floor = buffers(shape, pairs, dtype)
            cases = [[x.detach() for x in case] for case in cases]
            # Reads 2 N and writes 2 N: as many bytes as the loss, which reads 3 N and writes N.
            source = torch.ones(floor // 4, dtype=torch.int16, device="cuda")
            copies = [(torch.empty_like(source), source.clone()) for _ in range(2 if floor > 64 << 20 else len(cases))]
            row = {"shape": shape, "pairs": pairs, "dtype": dtype_name, "floor_bytes": floor}
            row["copy_us"] = on_device(lambda i, c=copies: c[i % len(c)][0].copy_(c[i % len(c)][1]), len(cases))
            del copies
            for backend in fused_backends():
                us = on_device(lambda i, c=cases, b=backend: one_call(b, c[i])[2], len(cases))
                row |= {f"{backend}_us": round(us, 2), f"{backend}_gb_s": round(floor / us / 1e3, 1),
                        f"{backend}_of_copy": round(row["copy_us"] / us, 3)}
            row |= {"copy_us": round(row["copy_us"], 2), "copy_gb_s": round(floor / row["copy_us"] / 1e3, 1)}
            rows.append(row)
            print(row, flush=True)
            best = {b: max(r.get(f"{b}_of_copy", 0) for r in rows) for b in fused_backends()}
            keep({"best": best, "rows": rows})
            del cases
            torch.cuda.empty_cache()


def host(keep: Keep) -> None:
    """Store the host's time and the launches of forward + backward on tensors too small to matter, beside eager's."""
    case = make_case((4, 4, 1, 1), torch.float32, "cuda")
    functions = {name: f for name, f in losses("cuda").items() if name not in ("compile", "liger_style")}
    times = medians({name: lambda _, f=f: forward_backward(f, case) for name, f in functions.items()}, seconds=8, together=200)
    launches = {}
    keep({"microseconds": times})
    for name, function in functions.items():
        forward_backward(function, case)
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            forward_backward(function, case)
            torch.cuda.synchronize()
        launches[name] = sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)
        keep({"microseconds": times, "kernels_and_copies": launches})


def memory(keep: Keep) -> None:
    """Store the peak memory of forward + backward beyond the inputs, in gradient tensors."""
    rows = []
    for dtype_name, dtype in DTYPES.items():
        case = make_case((2 * 256, *SHAPES["sd15"]), dtype, "cuda")
        one = case[0].numel() * dtype.itemsize
        for name, function in losses("cuda").items():
            if name in ("compile", "liger_style"):
                continue
            forward_backward(function, case)
            peak = peak_bytes(partial(forward_backward, function, case), "cuda")
            rows.append({"shape": "sd15", "pairs": 256, "dtype": dtype_name, "implementation": name,
                         "gradients": round(peak / one, 3)})
            keep({"rows": rows})


def baselines(keep: Keep) -> None:
    """Store the times of forward + backward, the host's included, beside eager, torch.compile and Liger's pattern."""
    rows = []
    cases = [("sd15", 1), ("sd15", 8), ("sd15", 64), ("sdxl", 4), ("video", 4), ("sd15", 1024)]
    for shape, pairs in cases:
        for dtype_name, dtype in DTYPES.items():
            inputs, floor = buffers(shape, pairs, dtype)
            calls = {name: lambda i, f=f, inputs=inputs: forward_backward(f, inputs[i % len(inputs)])
                     for name, f in losses("cuda").items()}
            first_calls(calls, "cuda")
            times = medians(calls, seconds=2, together=50)
            fused = next(times[name] for name in fused_backends())
            ratios = {name: round(us / fused, 2) for name, us in times.items()}
            rows.append({"shape": shape, "pairs": pairs, "dtype": dtype_name, "floor_bytes": floor, "us": times,
                         "over_fused": ratios})
            print(rows[-1], flush=True)
            few = [row["over_fused"] for row in rows if row["shape"] == "sd15" and row["pairs"] <= 8]
            keep({"targets": {name: min(ratio[name] for ratio in few) for name in ("eager", "compile")}, "rows": rows})
            del inputs
            torch.cuda.empty_cache()


def plans(keep: Keep) -> None:
    """Store the device's times of the native kernel's launch plans, from which its table of plans is made."""
    if "native" not in fused_backends():
        return keep({"skipped": available_backends("cuda")["native"]})
    largest = 16 if torch.cuda.get_device_capability()[0] >= 9 else 1
    rows = []
    for shape, pairs in (("sd15", 1), ("sd15", 256), ("video", 1), ("video", 64), ("sd3_1024", 16)):
        groups = -(-torch.Size(SHAPES[shape]).numel() // 4096)
        for dtype_name, dtype in DTYPES.items():
            cases, floor = buffers(shape, pairs, dtype)
            cases = [[x.detach() for x in case] for case in cases]
            row = {"shape": shape, "pairs": pairs, "dtype": dtype_name}
            chosen = [(CLUSTERED, blocks) for blocks in (1, 2, 4, 8, 16) if blocks <= largest and groups <= 4 * blocks < 8 * groups]
            for plan, blocks in [*chosen, (COOPERATIVE, 0), (IN_PASSES, 0)]:
                name = {CLUSTERED: f"clusters of {blocks}", COOPERATIVE: "cooperative", IN_PASSES: "in passes"}[plan]
                row[name] = round(on_device(lambda i, c=cases, p=plan, b=blocks: torch.ops.seppo_fast.pair_loss_planned(
                    *c[i], *OPTIONS, p, b)[2], len(cases)), 2)
            rows.append(row)
            keep({"microseconds": rows})
            del cases
            torch.cuda.empty_cache()


def sanitize() -> None:
    """A few small calls of each kind, for compute-sanitizer."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((4, 4, 64, 64), (2, 4, 128, 128), (6, 3, 17, 5), (2, 70_001)):
            case = make_case(shape, dtype, "cuda")
            for backend in fused_backends():
                for upstream in (None, 0.5):
                    loss = seppo_loss(*case, backend=backend, reduction="sum", grad_scale=upstream)
                    torch.autograd.grad(loss, case[0], torch.full_like(loss, 3.0))
                errors = per_sample_mse(case[1], case[2], backend=backend)
                torch.autograd.grad(seppo_loss(case[0], ref_mse=errors, target=case[2], backend=backend), case[0])
            if "native" in fused_backends():
                for plan in (0, COOPERATIVE, IN_PASSES):
                    for reference in (case[1], errors):
                        torch.ops.seppo_fast.pair_loss_planned(case[0].detach(), reference, case[2], *OPTIONS, plan, 0)
    torch.cuda.synchronize()
    print("calls made")


if __name__ == "__main__" and "--sanitize" in sys.argv:
    sanitize()
