"""Times the whole training loop: our command and the obvious trainer in turn, with the same model, data, batch and steps."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import ROOT
from benchmarks.jobs import PHASES, finish, fresh, start_training
from benchmarks.result_files import Keep, Row


@dataclass(frozen=True)
class Case:
    """What both trainers do. `updates` are measured, of ours and of the obvious one; before ours come `warm_up` others."""

    name: str
    base: Path
    demonstrations: Path
    work: Path
    config: str
    device: str = "cpu"
    resolution: int = 16
    steps: int = 8
    guidance: float = 2.0
    batch: int = 64
    micro: int = 64
    beta: float = 250.0
    lr: float = 2.5e-4
    ours: tuple[str, ...] = ()
    warm_up: int = 2
    updates: tuple[int, int] = (8, 2)
    rounds: int = 2
    batched: bool = True  # measure the obvious trainer with one pipeline call a micro-batch too


def quickstart_case(work: Path) -> Case:
    """The quickstart's model, data and settings; the base model gets only a few steps of training."""
    from seppo_fast.quickstart.base import Recipe, make_base
    from seppo_fast.quickstart.demonstrations import write_demonstrations
    from seppo_fast.quickstart.digits import split_digits

    make_base(work / "base", Recipe(copies=1, vae_steps=60, text_steps=20, denoiser_steps=20))
    write_demonstrations(work / "demonstrations", split_digits(0)[0])
    return Case("quickstart", work / "base", work / "demonstrations", work, "quickstart.json")


def sd15_case(work: Path, device: str = "cuda") -> Case:
    """A full-size Stable Diffusion 1.5 with random weights on random pictures; 50 steps, as in the paper."""
    from benchmarks.networks import write_pipeline

    write_pipeline(work / "sd15", device)
    pictures = work / "pictures"
    pictures.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    with (pictures / "metadata.jsonl").open("w") as metadata:
        for index in range(64):
            Image.fromarray(random.integers(0, 255, (512, 512, 3), dtype=np.uint8)).save(pictures / f"{index}.png")
            metadata.write(json.dumps({"file_name": f"{index}.png", "text": f"a handwritten {index}"}) + "\n")
    ours = ("seppo.samples.every=0", "seppo.sampler.batch_size=16", "seppo.sampler.compile=regional",
            "seppo.model.channels_last=true")
    return Case("sd15", work / "sd15", pictures, work, "ds_a100.json", device, resolution=512, steps=50, guidance=7.5, batch=16,
                micro=8, beta=2000.0, lr=5e-6, ours=ours, warm_up=1, updates=(3, 1), rounds=1, batched=False)


def measure(case: Case, keep: Keep) -> None:
    """Store a row for each run, and the ratios of the medians over the runs."""
    ways = {"obvious": run_obvious, "ours": run_ours} | ({"obvious_batched": run_batched} if case.batched else {})
    rows: list[Row] = []
    for turn in range(case.rounds):
        for name, way in ways.items():
            updates = way(case)[case.warm_up if name == "ours" else 1:]
            rate = statistics.median(case.batch / row["wall"] for row in updates)
            row: Row = {"trainer": name, "round": turn, "pairs_per_s": round(rate, 3), "updates": len(updates)}
            row["peak_gb"] = updates[-1]["peak_memory_gb"]
            row |= {f"{phase}_s": round(statistics.median(u[f"seconds_{phase}"] for u in updates), 4) for phase in PHASES}
            rows.append(row)
            print(row, flush=True)
            keep(summary(case, rows))


def summary(case: Case, rows: Sequence[Row]) -> Row:
    """The medians over the rounds, and the ratio of ours to each other trainer."""
    names = dict.fromkeys(row["trainer"] for row in rows)
    rates = {name: statistics.median(row["pairs_per_s"] for row in rows if row["trainer"] == name) for name in names}
    ratios = {f"ours_over_{name}": round(rates["ours"] / rate, 2) for name, rate in rates.items() if name != "ours"} \
        if "ours" in rates else {}
    about = {key: getattr(case, key) for key in ("name", "device", "resolution", "steps", "guidance", "batch", "micro", "warm_up")}
    return {"case": about | {"ours": list(case.ours)}, "pairs_per_s": rates, **ratios, "rows": list(rows)}


def run_obvious(case: Case, *more: str) -> list[Row]:
    """The obvious trainer in a process of its own; its first update warms it up."""
    rows = case.work / "obvious.jsonl"
    rows.unlink(missing_ok=True)
    values = {"base": case.base, "demonstrations": case.demonstrations, "rows": rows, "resolution": case.resolution,
              "steps": case.steps, "guidance": case.guidance, "batch": case.batch, "micro": case.micro, "beta": case.beta,
              "lr": case.lr, "updates": 1 + case.updates[1], "device": case.device}
    arguments = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    finish(subprocess.Popen([sys.executable, "-m", "benchmarks.throughput.obvious_trainer", *arguments, *more], cwd=ROOT,
                            stdout=(case.work / "obvious.log").open("w"), stderr=subprocess.STDOUT), case.work / "obvious.log")
    return [row | {"wall": row["seconds"]} for row in map(json.loads, rows.read_text().splitlines())]


def run_batched(case: Case) -> list[Row]:
    """The obvious trainer with one pipeline call for all prompts of a micro-batch."""
    return run_obvious(replace(case, updates=(0, 3 * case.updates[1])), "--batched")


def overrides(case: Case, run: Path) -> list[str]:
    """The changes that turn the shipped configuration into the case's."""
    updates = case.warm_up + case.updates[0]
    changes = {"train_batch_size": case.batch, "train_micro_batch_size_per_gpu": case.micro, "optimizer.params.lr": case.lr,
               "seppo.model.path": case.base, "seppo.data.source": case.demonstrations, "seppo.data.cache_dir": case.work / "cache",
               "seppo.data.resolution": case.resolution, "seppo.output_dir": run, "seppo.beta": case.beta,
               "seppo.sampler.solver": "ddim", "seppo.sampler.steps": case.steps, "seppo.sampler.guidance_scale": case.guidance,
               # One iteration: between iterations the pool grows and checkpoints are written, in the paper every 30 updates.
               "seppo.iterations": 1, "seppo.updates_per_iteration": updates, "seppo.checkpoint.every": 10**6}
    return [*(f"{key}={value}" for key, value in changes.items()), *case.ours]


def run_ours(case: Case) -> list[Row]:
    """Our command in a process of its own. `wall` is the time between two rows of metrics.jsonl, everything included."""
    run = fresh(case.work / "run")
    log = case.work / "ours.log"
    process = start_training(case.config, overrides(case, run), log)
    times = watch(process, run / "metrics.jsonl")
    finish(process, log)
    rows = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    return [row | {"wall": times[i] - times[i - 1] if i else float("inf")} for i, row in enumerate(rows)]


def watch(process: subprocess.Popen, metrics: Path) -> list[float]:
    """The times at which the rows of `metrics` appeared, to 10 ms."""
    times: list[float] = []
    while True:
        ended = process.poll() is not None
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        times += [time.perf_counter()] * (lines - len(times))
        if ended:
            return times
        time.sleep(0.01)
