"""Times the loss: `python -m benchmarks.loss --out benchmarks/results`. Writes loss_<device>.json, .csv and two plots.

Measured are forward, forward + backward and its peak memory, and the host's time alone (on tensors too small to matter). The
implementations take turns, on buffers that rotate through twice the size of the last cache. `copy` copies 2 N elements, where N is
the size of model_pred. It reads 2 N and writes 2 N: the 4 N that the loss cannot do without (three tensors read, one written).
"""

import argparse
import csv
import os
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.loss.cases import (
    DTYPES,
    floor_bytes,
    forward_backward,
    losses,
    make_case,
    needed_bytes,
    rotating_cases,
    rotating_copies,
    sets,
)
from benchmarks.loss.summary import ratios, row_of, targets
from benchmarks.result_files import Row, about, one_row_a_line
from benchmarks.timing import first_calls, free_memory, in_turn, last_level_cache, peak_bytes
from seppo_fast.ops import available_backends

# The targets' cases come first: a run that is cut short keeps what it has measured.
CASES = [*(("sd15", pairs) for pairs in (2, 4, 8, 16, 32, 64, 1, 256, 1024)), ("sdxl", 1), ("sdxl", 8), ("video", 2),
         ("video", 8), ("sd3_1024", 2)]


def measure_case(shape: str, pairs: int, dtype_name: str, device: str, seconds: float, rotate: int) -> list[Row]:
    dtype = DTYPES[dtype_name]
    floor = floor_bytes(shape, pairs, dtype)
    cases = rotating_cases(shape, pairs, dtype, device, sets(rotate, 3 * floor // 4))
    copies = rotating_copies(floor, dtype, device, sets(rotate, floor))
    functions = losses(device)
    both = {name: lambda i, f=f: forward_backward(f, cases[i % len(cases)]) for name, f in functions.items()}
    forward = {name: lambda i, f=f: f(*cases[i % len(cases)]) for name, f in functions.items()}

    def copy(i: int) -> None:
        to, source = copies[i % len(copies)]
        to.copy_(source)

    # On a GPU the calls queue up, as in training: the host waits for the device only after `together` of them.
    how = {"device": device, "block": 1, "together": 50} if device == "cuda" else {}
    compiling = first_calls(both, device)
    times = in_turn(both | {"copy": copy}, seconds, **how)
    peaks = {name: round(peak_bytes(partial(call, 0), device) / (floor // 4), 3) for name, call in both.items()}
    labels = {"what": "forward_backward", "shape": shape, "pairs": pairs, "dtype": dtype_name, "floor_bytes": floor}
    more = {name: {"peak_gradients": peaks[name], "first_call_s": compiling[name]} for name in both} | {"copy": {}}
    rows = [row_of(labels, name, values, **more[name]) for name, values in times.items()]
    labels = labels | {"what": "forward"}
    return rows + [row_of(labels, name, values) for name, values in in_turn(forward, seconds / 3, **how).items()]


def measure_host(device: str, seconds: float) -> list[Row]:
    rows = []
    for pairs in (1, 2):
        case = make_case((2 * pairs, 4, 1, 1), torch.float32, device)
        calls = {name: lambda _, f=f, case=case: forward_backward(f, case) for name, f in losses(device).items()}
        first_calls(calls, device)
        how = {"block": 1, "together": 200} if device == "cuda" else {"block": 50}
        labels = {"what": "host", "shape": "tiny", "pairs": pairs, "dtype": "fp32", "floor_bytes": 0}
        rows += [row_of(labels, name, values) for name, values in in_turn(calls, seconds, device=device, **how).items()]
    return rows


def write(out: Path, device: str, result: Row, rows: list[Row]) -> Row:
    """Write the results so far as JSON and CSV, and return what the JSON holds."""
    found = ratios(rows)
    ended = {"machine": result["machine"] | {"load_average_at_end": round(os.getloadavg()[0], 2)}}
    result = result | ended | {"targets": targets(found, device), "ratios": found, "rows": rows}
    (out / f"loss_{device}.json").write_text(one_row_a_line(result))
    with (out / f"loss_{device}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=7.0, help="for forward + backward of a case, a third for forward alone")
    parser.add_argument("--cases", type=int, default=len(CASES), help="measure only the first CASES shapes")
    parser.add_argument("--rotate-mb", type=int, help="MB of inputs before one is used again (default: twice the last cache)")
    parser.add_argument("--memory-gb", type=float, help="leave out cases that need more (default: half of the free memory)")
    arguments = parser.parse_args(argv)
    out, device, begun = arguments.out, arguments.device, time.perf_counter()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rotate = arguments.rotate_mb << 20 if arguments.rotate_mb else 2 * last_level_cache(device)
    budget = arguments.memory_gb * 2**30 if arguments.memory_gb else free_memory(device) / 2
    result: Row = about(device) | {
        "backends": available_backends(device), "left_out": [],
        "settings": {"seconds": arguments.seconds, "rotate_mb": rotate >> 20, "memory_gb": round(budget / 2**30, 1)}}
    out.mkdir(parents=True, exist_ok=True)
    rows = measure_host(device, arguments.seconds)
    for shape, pairs in CASES[:arguments.cases]:
        for dtype in DTYPES:
            needed = needed_bytes(shape, pairs, DTYPES[dtype], rotate)
            if needed > budget:
                result["left_out"].append(f"{shape} {pairs} {dtype}: needs {needed / 2**30:.1f} GB of memory")
                continue
            rows += measure_case(shape, pairs, dtype, device, arguments.seconds, rotate)
            result["seconds"] = round(time.perf_counter() - begun, 1)
            written = write(out, device, result, rows)
            print(next((row for row in reversed(written["ratios"]) if row["what"] == "forward_backward"), ""), flush=True)
    written = write(out, device, result, rows)
    for target in written["targets"]:
        print(target)
    try:
        from benchmarks.loss.plots import draw
    except ImportError as error:
        print(f"no plots ({error}); where matplotlib is installed,"
              f" `python -m benchmarks.loss.plots {out / f'loss_{device}.json'}` draws them")
    else:
        draw(out / f"loss_{device}.json")


if __name__ == "__main__":
    main()
