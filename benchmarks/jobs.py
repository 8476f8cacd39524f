"""The trainer's command in a process of its own, and waiting for such processes."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT

PHASES = ("sampling", "data", "training")  # metrics.jsonl has `seconds_<phase>` of each


def start_training(config: str, overrides: Sequence[str], log: Path) -> subprocess.Popen:
    """A run of seppo_fast/train.py that has just started and writes its output to `log`."""
    command = [sys.executable, "seppo_fast/train.py", "--config", config, "--set", *overrides]
    return subprocess.Popen(command, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for the process. When it failed, a RuntimeError with the end of its log."""
    if process.wait():
        raise RuntimeError(f"{process.args[1:4]} ended with status {process.returncode}:\n{log.read_text()[-2000:]}")


def fresh(folder: Path) -> Path:
    """`folder`, without what an earlier run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder
