"""The steps of the GPU suite: their groups, their limits, and how one runs."""

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from benchmarks.gpu_suite import checks, loss_steps
from benchmarks.result_files import Row

SECONDS = 530  # of the whole run
# Name -> seconds at most; the functions that measure are in loss_steps.py and training_steps.py. The most important steps
# come first in each group and have enough time: the loss's correctness and bandwidth; the sampler beside diffusers, loop, memory.
LOSS = {"build": 90, "tests_native": 90, "tests_triton": 120, "bandwidth": 70, "memcheck": 70, "racecheck": 70, "host": 40,
        "memory": 20, "baselines": 120, "plans": 40}
TRAINING = {"micro_batch": 400}
THROUGHPUT = {"tests_sampler": 50, "sampler": 160, "loop": 180, "training_memory": 120, "swap": 30}
VIDEO = {"video": 170}
FLOWS = {"flows": 170}
ROLLOUTS = {"rollouts": 240}
MACHINE = 20
STEPS = LOSS | THROUGHPUT | TRAINING | VIDEO | FLOWS | ROLLOUTS
GROUPS = {"loss": list(LOSS), "throughput": list(THROUGHPUT), "training": list(TRAINING), "video": list(VIDEO),
          "flows": list(FLOWS), "rollouts": list(ROLLOUTS)}
CHECKS = ("tests_native", "tests_triton", "tests_sampler", "memcheck", "racecheck")


def machine() -> Row:
    """The GPU, the driver and the versions."""
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
    """Run one step in this process. Its result goes to DIR/<name>.json, and so do its partial results before."""
    def keep(result: Row) -> None:
        temporary = out / f".{name}.json"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(out / f"{name}.json")

    if name == "build":
        keep(checks.build(out))
    elif name.startswith("tests"):
        keep(checks.tests(name, out))
    elif name in ("memcheck", "racecheck"):
        keep(checks.sanitize(name, out) if have("compute-sanitizer") else {"ok": None, "output": "there is no compute-sanitizer"})
    elif name == "machine":
        keep(machine())
    elif name in THROUGHPUT | TRAINING | VIDEO | FLOWS | ROLLOUTS:
        from benchmarks.gpu_suite import training_steps

        training_steps.step(name, out, keep, limit)
    else:
        getattr(loss_steps, name)(keep)
