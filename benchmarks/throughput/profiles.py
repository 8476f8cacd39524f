"""Where the time of the training loop goes, as `seppo_fast.profile_run` reports it."""

import os
import subprocess
import sys

from benchmarks import ROOT
from benchmarks.throughput.loop import Case, overrides
from seppo_fast.quickstart.steps import free_port


def of_training(case: Case, device: str) -> dict[str, str]:
    """Reports by name: of the loop in one process and, on the CPU, of two ranks."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    micro = f"train_micro_batch_size_per_gpu={case.batch // 2}"
    ways = {"loop": ([], [], os.environ)} | (
        {"ranks": (launcher, [micro], os.environ | {"OMP_NUM_THREADS": "1"})} if device == "cpu" else {})
    reports = {}
    for name, (begin, more, environment) in ways.items():
        command = [sys.executable, *begin, "seppo_fast/profile_run.py", "--config", case.config, "--set",
                   *overrides(case, case.work / "run"), *more]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"profile_run ended with status {done.returncode}: {done.stderr[-2000:]}")
        text = done.stdout[done.stdout.index("where a second goes"):]
        reports[name] = "\n".join(line for line in text.splitlines() if not line.startswith("[20"))  # the launcher's
    return reports
