"""The steps of the GPU suite that build and test; each returns what its result file holds."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks import ROOT
from benchmarks.result_files import Row

TESTS = {"tests_native": ["tests/ops/test_cuda_build.py"], "tests_triton": ["tests/ops/test_triton.py"],
         "tests_sampler": ["tests/reference/test_cuda_graph.py", "tests/reference/test_improver.py",
                           "tests/reference/test_flow_graph.py"]}
COUNTS = ("tests", "failures", "errors", "skipped")
PYTEST = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]


def build(out: Path) -> Row:
    """Build the CUDA and CPU libraries in place. Where the CUDA library cannot be built, the Triton backend remains."""
    run = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"SEPPO_FAST_BUILD": "cuda"})
    library = ROOT / "seppo_fast/_cuda.so"
    return {"ok": run.returncode == 0 and library.exists(), "bytes": library.stat().st_size if library.exists() else 0,
            "output": (run.stdout + run.stderr)[-2000:]}


def tests(name: str, out: Path, processes: int = 8) -> Row:
    """Counts and failures of tests on this GPU: of a backend of the loss, or of the samplers in CUDA graphs.

    Several processes share the tests, because most of their time goes to the compiler.
    """
    chosen = "" if name == "tests_sampler" else "not interpreter and not compiled and not spill and not 16_bytes"
    listed = subprocess.run([*PYTEST, "--collect-only", *TESTS[name], "-k", chosen], cwd=ROOT, capture_output=True, text=True,
                            check=False)
    files = {Path(file).name: file for file in TESTS[name]}
    parts = [line.split("::", 1) for line in listed.stdout.splitlines() if "::" in line]
    found = [f"{files[Path(file).name]}::{test}" for file, test in parts]
    if not found:
        return {"ok": False, "failed": [f"no test was found: {(listed.stdout + listed.stderr)[-300:]}"]}
    processes = min(processes, os.cpu_count() or 1, len(found))
    reports = [out / f"{name}_{index}.xml" for index in range(processes)]
    for report in reports:
        report.unlink(missing_ok=True)
    running = [subprocess.Popen([*PYTEST, *found[index::processes], f"--junitxml={report}"], cwd=ROOT)
               for index, report in enumerate(reports)]
    for process in running:  # when interrupted, each reports its tests so far
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:
                continue
    outcomes = [outcome(process.returncode, report) for process, report in zip(running, reports, strict=True)]
    counts = {key: sum(one.get(key, 0) for one in outcomes) for key in COUNTS}
    failed = [text for one in outcomes for text in one["failed"]]
    interrupted = any(one["interrupted"] for one in outcomes)
    skipped = sorted({reason for one in outcomes for reason in one["skipped_for"]})
    ran = not any("GPU" in reason for reason in skipped)  # a missing backend was not tested, so this is no success
    ok = ran and not failed and not interrupted and len(found) == counts["tests"] > counts["skipped"]
    return counts | {"found": len(found), "processes": processes, "ok": ok, "interrupted": interrupted, "failed": failed,
                     "skipped_for": skipped}


def outcome(status: int, report: Path) -> Row:
    """What one pytest process reported. The report is deleted."""
    if not report.exists():
        return {"failed": [f"pytest ended with status {status} and no report"], "interrupted": False, "skipped_for": []}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    report.unlink()
    failed = [f"{case.get('name')}: {bad.get('message')[:300]}" for case in suite.iter("testcase")
              for bad in case if bad.tag in ("failure", "error")]
    return {key: int(suite.get(key)) for key in COUNTS} | {
        "failed": failed, "interrupted": status == 2,  # pytest's status for an interruption
        "skipped_for": [bad.get("message", "")[:200] for bad in suite.iter("skipped")]}


def sanitize(tool: str, out: Path) -> Row:
    """compute-sanitizer's verdict, its exit status, on a few small calls of each plan."""
    run = subprocess.run(["compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
                          sys.executable, "-m", "benchmarks.gpu_suite.loss_steps", "--sanitize"], cwd=ROOT, capture_output=True,
                         text=True, check=False,
                         env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})  # with the cache it sees whole pools only
    output = run.stdout + run.stderr
    return {"ok": run.returncode == 0 and "calls made" in output, "output": output[-1500:]}
