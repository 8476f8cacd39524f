"""Everything that needs a GPU: `python -m benchmarks.gpu_suite --out DIR [--only throughput]`, under 9 minutes, no network.

The steps run in the order of what they are worth, each in a process of its own with a time limit, and DIR/gpu_suite.json is
rewritten after each, so whatever stops the run leaves what came before. A step that fails or times out does not stop the
others; what it had measured by then is kept. There are three groups, each for a call of its own: `loss` needs nothing but torch,
triton and pytest, and nvcc for the CUDA library; `throughput` needs diffusers and pydantic too, and the package's other
requirements for the steps that train; `video` needs PyAV beside these, and DALI to measure what it is for.
`--wheels [DIR]`, on a machine with a network, fetches what a machine without one lacks and says how large it is.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import gpu_steps, wheels
from benchmarks.throughput_summary import rates

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 530  # of the whole run
GRACE = 8  # seconds between SIGINT, at which a step ends with what it has, and SIGKILL
# name -> seconds at most; the functions that measure are in gpu_steps.py and gpu_throughput.py. What a call must end with comes
# first in its group, and has room: correctness and bandwidth of the loss; the sampler beside diffusers, loop and memory.
LOSS = {"build": 90, "tests_native": 90, "tests_triton": 120, "bandwidth": 70, "memcheck": 70, "racecheck": 70, "host": 40,
        "memory": 20, "baselines": 120, "plans": 40}
THROUGHPUT = {"tests_sampler": 50, "sampler": 160, "loop": 180, "training_memory": 120, "swap": 30}
VIDEO = {"video": 170}
MACHINE = 20
STEPS = LOSS | THROUGHPUT | VIDEO
GROUPS = {"loss": list(LOSS), "throughput": list(THROUGHPUT), "video": list(VIDEO)}
CHECKS = ("tests_native", "tests_triton", "tests_sampler", "memcheck", "racecheck")
TESTS = {"tests_native": "tests/ops/test_cuda_build.py", "tests_triton": "tests/ops/test_triton.py",
         "tests_sampler": "tests/reference/test_cuda_graph.py"}
COUNTS = ("tests", "failures", "errors", "skipped")
PYTEST = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]


def build(out: Path) -> dict[str, object]:
    """The CUDA and CPU libraries in place, by setup.py. What cannot be built leaves the Triton backend."""
    run = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"SEPPO_FAST_BUILD": "cuda"})
    library = ROOT / "seppo_fast/_cuda.so"
    return {"ok": run.returncode == 0 and library.exists(), "bytes": library.stat().st_size if library.exists() else 0,
            "said": (run.stdout + run.stderr)[-2000:]}


def tests(name: str, out: Path, processes: int = 8) -> dict[str, object]:
    """A file's tests on this GPU: of a backend against fp64, bit for bit, in graphs and streams; of the captured sampler.

    They are dealt to several processes, since most of their time is the compiler's.
    """
    chosen = "" if name == "tests_sampler" else "not interpreter and not compiled and not spill and not 16_bytes"
    listed = subprocess.run([*PYTEST, "--collect-only", TESTS[name], "-k", chosen], cwd=ROOT, capture_output=True, text=True,
                            check=False)
    found = [f"{TESTS[name]}::{line.split('::', 1)[1]}" for line in listed.stdout.splitlines() if "::" in line]
    if not found:
        return {"ok": False, "failed": [f"no test was found: {(listed.stdout + listed.stderr)[-300:]}"]}
    processes = min(processes, os.cpu_count() or 1, len(found))
    reports = [out / f"{name}_{index}.xml" for index in range(processes)]
    for report in reports:
        report.unlink(missing_ok=True)
    running = [subprocess.Popen([*PYTEST, *found[index::processes], f"--junitxml={report}"], cwd=ROOT)
               for index, report in enumerate(reports)]
    for process in running:  # interrupted, each writes its report of the tests so far
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                continue
    parts = [outcome(process.returncode, report) for process, report in zip(running, reports, strict=True)]
    counts = {key: sum(part.get(key, 0) for part in parts) for key in COUNTS}
    failed = [text for part in parts for text in part["failed"]]
    interrupted = any(part["interrupted"] for part in parts)
    skipped = sorted({reason for part in parts for reason in part["skipped_for"]})
    ran = not any("GPU" in reason for reason in skipped)  # a backend that is not there was not tested, which is no success
    ok = ran and not failed and not interrupted and len(found) == counts["tests"] > counts["skipped"]
    return counts | {"found": len(found), "processes": processes, "ok": ok, "interrupted": interrupted, "failed": failed,
                     "skipped_for": skipped}


def outcome(status: int, report: Path) -> dict[str, object]:
    """What one pytest process reported, and then the report is of no more use."""
    if not report.exists():
        return {"failed": [f"pytest ended with status {status} and no report"], "interrupted": False, "skipped_for": []}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    report.unlink()
    failed = [f"{case.get('name')}: {bad.get('message')[:300]}" for case in suite.iter("testcase")
              for bad in case if bad.tag in ("failure", "error")]
    return {key: int(suite.get(key)) for key in COUNTS} | {
        "failed": failed, "interrupted": status == 2,  # pytest's status when it was
        "skipped_for": [bad.get("message", "")[:200] for bad in suite.iter("skipped")]}


def sanitize(tool: str, out: Path) -> dict[str, object]:
    """compute-sanitizer over a few small calls of each plan; its exit code is its verdict."""
    run = subprocess.run(["compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
                          sys.executable, "-m", "benchmarks.gpu_steps", "--sanitize"], cwd=ROOT, capture_output=True, text=True,
                         check=False, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})  # or it sees whole pools only
    said = run.stdout + run.stderr
    return {"ok": run.returncode == 0 and "calls made" in said, "said": said[-1500:]}


def machine() -> dict[str, object]:
    import triton
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    query = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True,
                           check=False) if have("nvidia-smi") else None
    return {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}", "gpus": torch.cuda.device_count(),
            "multiprocessors": properties.multi_processor_count, "l2_mb": properties.L2_cache_size >> 20,
            "memory_gb": round(properties.total_memory / 2**30, 1), "driver": query.stdout.strip() if query else "",
            "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__,
            "python": platform.python_version(), "cpu_cores": os.cpu_count()}


def have(program: str) -> bool:
    return shutil.which(program) is not None


def run_step(name: str, out: Path, limit: float) -> None:
    """In the step's own process: its result goes to DIR/<name>.json, and partial ones before it."""
    def keep(result: dict[str, object]) -> None:
        temporary = out / f".{name}.json"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(out / f"{name}.json")

    if name == "build":
        keep(build(out))
    elif name.startswith("tests"):
        keep(tests(name, out))
    elif name in ("memcheck", "racecheck"):
        keep(sanitize(name, out) if have("compute-sanitizer") else {"ok": None, "said": "there is no compute-sanitizer"})
    elif name == "machine":
        keep(machine())
    elif name in THROUGHPUT | VIDEO:
        from benchmarks import gpu_throughput

        gpu_throughput.step(name, out, keep, limit)
    else:
        getattr(gpu_steps, name)(keep)


def ended(process: subprocess.Popen, limit: float) -> str:
    """How a step ended: by itself, or at `limit` seconds. All that it started gets SIGINT shortly before, and then SIGKILL."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--wheels", type=Path, nargs="?", const=Path("build/wheels"), metavar="DIR",
                        help="fetch into DIR (build/wheels) what a GPU machine without a network lacks, list it, and end")
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
    summary: dict[str, object] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": gpu_steps.commit()}
    for name, limit in {"machine": MACHINE, **STEPS}.items():
        if name not in ("machine", *only):
            continue
        if only == {name}:  # nobody waits for what it leaves
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
        print(f"{name}: {outcome}, {summary[name]['seconds']} s {gpu_steps.headline(found)}", flush=True)
        if outcome != "done":
            print("".join((out / f"{name}.log").read_text().splitlines(keepends=True)[-15:]), flush=True)
    shutil.rmtree(out / "work", ignore_errors=True)  # models and runs of the throughput steps
    bad = [name for name in CHECKS if name in summary and summary[name].get("ok", False) is False]  # no verdict is no success
    sys.exit(f"failed: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
