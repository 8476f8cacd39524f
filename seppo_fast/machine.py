"""The machine and the source that a result was measured on."""

import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def machine() -> dict[str, Any]:
    """The processor's name and the cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"cpu": name, "cores": cores(), "threads": torch.get_num_threads(), "system": platform.platform()}


def cores() -> int:
    """The cores that this process may use, by its affinity and by the quota of its container, which PyTorch does not see."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such control group, or "max"
        return allowed


def too_many_threads(ranks: int, threads: int, cores: int) -> str:
    """Advice where all ranks of a machine together have more threads than it has cores; else empty."""
    if ranks * threads <= cores:
        return ""
    each = max(1, cores // ranks)
    return (f"{ranks} rank{'s' * (ranks > 1)} of {threads} thread{'s' * (threads > 1)} share {cores} core{'s' * (cores > 1)} here"
            f" and slow one another down, sometimes tenfold: set OMP_NUM_THREADS={each} before the command")


def commit() -> str | None:
    """The source's git commit, with "+" where files differ from it; None outside a repository of this source.

    An installed copy may lie in somebody else's repository, which does not track it.
    """
    git, this = ["git", "-C", str(Path(__file__).parent)], Path(__file__).name
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", this], capture_output=True)
        if tracked.returncode:
            return None
        described = subprocess.run([*git, "describe", "--always", "--abbrev=40", "--dirty=+"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return described.stdout.strip() or None
