"""What each result file says about its measurement (machine, date, commit, versions), and how the file is written."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import ROOT

Row = dict[str, Any]
Keep = Callable[[Row], None]  # stores the results so far


def about(device: str, *packages: str) -> Row:
    """The machine, the date, the commit, and the versions of torch, CUDA, Python and these packages."""
    import torch  # seconds, which what only reads a result need not wait for

    return {"machine": machine(device), "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
                         **{package: version(package) for package in packages}}}


def machine(device: str) -> Row:
    """The processor, its cores and threads, the load, and the GPU where one is measured."""
    import torch

    from benchmarks.timing import last_level_cache

    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    cpu = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")),
               platform.processor())
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "avx512": "avx512bw" in text,
            "cache_mb": last_level_cache(device) >> 20, "load_average_at_start": round(os.getloadavg()[0], 2), **gpu}


def commit() -> str:
    """The commit, with "+" when the tree has changes; empty outside a checkout."""
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"], capture_output=True,
                             text=True, cwd=ROOT, check=False)
    except FileNotFoundError:
        return ""
    return run.stdout.strip()


def one_row_a_line(result: Row) -> str:
    """`result` as JSON in which each item of a list has a line of its own."""
    def text(value: object) -> str:
        return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if isinstance(value, list) and value else json.dumps(value)

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in result.items()) + "\n}\n"
