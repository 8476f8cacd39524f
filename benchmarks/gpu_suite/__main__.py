"""Everything that needs a GPU: `python -m benchmarks.gpu_suite --out DIR [--only throughput]`, under 9 minutes, no network.

The most important steps run first, each in a process of its own with a time limit. DIR/gpu_suite.json is written after each step,
so that a run that is stopped keeps the steps before. A step that fails or reaches its limit does not stop the others, and keeps
what it has measured. Run each group of steps in a call of its own. `loss` needs torch, triton and pytest, and nvcc for the CUDA
library. `throughput` needs diffusers and pydantic too, and the package's other requirements for the steps that train; so does
`training`, a micro-batch plain, with compiled blocks and as one graph. `video` needs PyAV beside these, and DALI, which is what it
measures.
On a machine with a network, `--wheels [DIR]` fetches the wheels that a machine without one lacks and lists their sizes.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.gpu_suite import loss_steps, wheels
from benchmarks.gpu_suite.steps import CHECKS, GROUPS, MACHINE, SECONDS, STEPS, run_step
from benchmarks.result_files import Row, commit
from benchmarks.throughput.summary import rates

GRACE = 8  # seconds between SIGINT, at which a step ends with what it has, and SIGKILL


def ended(process: subprocess.Popen, limit: float) -> str:
    """How a step ended. If it still runs shortly before `limit` seconds, all its processes get SIGINT, and at the limit SIGKILL."""
    grace = min(GRACE, limit / 3)
    try:
        code = process.wait(limit - grace)
        return "done" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"stopped after {limit:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--wheels", type=Path, nargs="?", const=Path("build/wheels"), metavar="DIR",
                        help="fetch into DIR (default: build/wheels) the wheels that a GPU machine without a network lacks")
    parser.add_argument("--python", default="3.12", help="that machine's Python, for --wheels")
    parser.add_argument("--present", nargs="+", default=[], metavar="NAME", help="more packages that it has, for --wheels")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the whole run")
    parser.add_argument("--only", nargs="+", choices=[*GROUPS, *STEPS], help="run just these steps or groups")
    parser.add_argument("--step", choices=["machine", *STEPS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.wheels:
        found = wheels.fetch(arguments.wheels, ROOT / "constraints.txt", arguments.python, arguments.present)
        return print(f"{wheels.listed(found)}\n(in {arguments.wheels}; DALI apart)")
    if arguments.out is None:
        parser.error("--out is needed")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.step:
        return run_step(arguments.step, out, arguments.seconds)

    if not torch.cuda.is_available():
        sys.exit("there is no GPU here (torch.cuda.is_available() is False)")
    only = {step for name in arguments.only or GROUPS for step in GROUPS.get(name, [name])}
    until = time.monotonic() + arguments.seconds
    summary: Row = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    for name, limit in {"machine": MACHINE, **STEPS}.items():
        if name not in ("machine", *only):
            continue
        if only == {name}:  # a single step may take the whole time
            limit = arguments.seconds
        result = out / f"{name}.json"
        result.unlink(missing_ok=True)
        start = time.monotonic()
        limit = min(limit, until - start)
        outcome = "no time left"
        if limit > 5:
            with (out / f"{name}.log").open("w") as log:
                command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", out, "--step", name, "--seconds", str(limit)]
                process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
                outcome = ended(process, limit)
        found = json.loads(result.read_text()) if result.exists() else {}
        summary[name] = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1), **found}
        summary["rates"] = rates(summary)
        (out / "gpu_suite.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(f"{name}: {outcome}, {summary[name]['seconds']} s {loss_steps.headline(found)}", flush=True)
        if outcome != "done":
            print("".join((out / f"{name}.log").read_text().splitlines(keepends=True)[-15:]), flush=True)
    shutil.rmtree(out / "work", ignore_errors=True)  # models and runs of the steps that train
    # A check without a verdict has not passed.
    bad = [name for name in CHECKS if name in summary and summary[name].get("ok", False) is False]
    sys.exit(f"failed: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
