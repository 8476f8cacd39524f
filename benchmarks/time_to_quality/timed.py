"""Seconds that can be compared: of each way's sampling and training, and of the obvious trainer, in this process and in turn.

The runs' own seconds cannot be: each run has other programs beside it.
"""

import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.by_seed import assignments
from benchmarks.jobs import fresh
from benchmarks.time_to_quality.obvious import obvious_trainers
from benchmarks.time_to_quality.rollouts import Rollouts
from benchmarks.time_to_quality.ways import PAPER, SFT, TASKS, TIMED, Settings, drawn_like, overrides
from benchmarks.timing import alternated
from seppo_fast.configfile import load_config
from seppo_fast.quickstart.models import KINDS
from seppo_fast.quickstart.report import read_metrics
from seppo_fast.reference.batching import even
from seppo_fast.train import train

TURNS = 4  # the first one is not counted
UPDATES = 4  # of a training in each turn; the first one is not counted: its policy is still the reference


def seconds_of_updates(home: Path, seed: int, settings: Settings, turns: int = TURNS) -> dict[str, Any]:
    """`updates`: the seconds of one update of each way by medians, sampling and training; `obvious`: of the obvious trainer's;
    `busy`: the share of the time in which a processor was at work on this.

    A sample's seconds are those of a batch like the run's; an update costs as many as it draws, fewer where they are reused.
    """
    task, rollouts = TASKS[settings.task], Rollouts(home, seed, settings)
    like, batch = drawn_like(task.ways), settings.batch_size
    size = rollouts.keys(PAPER).sampler.batch_size
    samples = even(settings.updates * batch, size if isinstance(size, int) else batch)
    draws = {way: partial(rollouts.draw, rollouts.sampler(way), range(samples)) for way in dict.fromkeys(like.values())}
    training: dict[str, list[float]] = {name: [] for name in (PAPER, SFT)}
    trainings = {f"training, {name}": partial(train_some, home, seed, name, settings, took) for name, took in training.items()}
    trainers = obvious_trainers(home, seed, settings) if task.obvious else {}
    updates = {name: partial(trainer.update, batch) for name, trainer in trainers.items()}
    began, computed = time.perf_counter(), time.process_time()
    times = {name: median(took[1:]) for name, took in alternated({**draws, **trainings, **updates}, 0.0, least=turns).items()}
    busy = (time.process_time() - computed) / (time.perf_counter() - began)

    found = {}
    for name, way in task.ways.items():
        drawing = 0.0 if name == SFT else batch / way.reuse * times[like[name]] / samples
        found[name] = {"sampling_s": round(drawing, 5), "training_s": round(median(training[SFT if name == SFT else PAPER]), 5)}
    return {"updates": found, "obvious": {name: round(times[name], 4) for name in updates}, "turns": turns - 1,
            "busy": round(busy, 3)}


def train_some(home: Path, seed: int, name: str, settings: Settings, took: list[float]) -> None:
    """Train a few updates as a run of the way does, and add the seconds of each one's training; what drew does not change them."""
    run = fresh(home / TIMED / name)
    changes: dict[str, object] = {"seppo.output_dir": run.resolve(), "seppo.iterations": 1, "seppo.updates_per_iteration": UPDATES}
    if name != SFT:
        changes["seppo.sampler.steps"] = 1
    given = [*overrides(home.parent, seed, name, settings), *assignments(changes)]
    train(load_config(KINDS[settings.model].config, given).as_dict())
    took += [row["seconds_training"] for row in read_metrics(run / "metrics.jsonl")[1:]]
