"""One run of the benchmark in a process of its own: `python -m benchmarks.flipper.runs WORK SEED METHOD`.

The method "base" makes the seed's base model and its data, as for the ablation. The others train from them: SePPO-w with signs of
one noise or more. In the run with one noise, pairs are watched.

    WORK/seed_0/base/                 a pipeline directory
    WORK/seed_0/views/                what the watched pairs showed (watching.py)
"""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.ablation import runs as ablation
from benchmarks.by_seed import Run, policy_file, report_run, train

BASE, WATCHED = "base", "draws_1"
DRAWS = (1, 2, 4, 16, 64)  # noises of a watched winner, over which the mean is taken
TIMES = 16  # as many of them at most have timesteps of their own
LEVELS = 5  # of the noise
METHODS = {WATCHED: 1, "draws_4": 4, "draws_16": 16}  # noises of a sign


@dataclass(frozen=True)
class Settings(ablation.Settings):
    """The ablation's, and how many updates of each iteration are watched, and how many of these with all the noises."""

    watched: int = 6
    averaged: int = 1


def overrides(work: Path, seed: int, method: str, settings: Settings) -> list[str]:
    """What a run changes in the quickstart's configuration: SePPO-w's changes in the ablation, and the noises of a sign."""
    run = (work / f"seed_{seed}" / method).resolve()
    return [*ablation.overrides(work, seed, "seppo_w", settings), f"seppo.output_dir={run}", f"seppo.aaf_draws={METHODS[method]}"]


def train_and_judge(home: Path, seed: int, method: str, settings: Settings) -> Run:
    """Train, from where an earlier attempt stopped, and judge the last policy and what was watched. The process ends here when the
    trainer stops early."""
    from benchmarks.flipper.telling import told
    from benchmarks.flipper.views import read_views
    from benchmarks.flipper.watching import evenly, watched_updates
    from seppo_fast.quickstart.models import KINDS
    from seppo_fast.quickstart.report import iteration_mean, read_metrics

    run, changes = home / method, overrides(home.parent, seed, method, settings)
    config = KINDS[settings.model].config
    updates = watched_updates(settings.iterations, settings.updates, settings.watched)
    if method == WATCHED:
        train_watched(run, config, changes, updates, evenly(updates, settings.watched, settings.averaged))
    else:
        train(run, config, changes)
    rows, last = read_metrics(run / "metrics.jsonl"), policy_file(run, method, settings.iterations, settings.updates)
    found = {"points": ablation.judge(home / "base", {settings.iterations * settings.updates: last}, seed, settings),
             "aaf_rate": [iteration_mean(rows, "aaf_rate", k) for k in range(settings.iterations)]}
    if method == WATCHED:
        views = read_views(home / "views", updates, home / "base", seed)
        found["told"] = told(views, settings.iterations, settings.updates, DRAWS, LEVELS)
    return found


def train_watched(run: Path, config: str, changes: list[str], updates: list[int], averaged: list[int]) -> None:
    """As `by_seed.train`, with a trainer that looks at the pairs of these updates."""
    from benchmarks.flipper.watching import Watching
    from seppo_fast.command import carried_out
    from seppo_fast.configfile import load_config
    from seppo_fast.ranks import join
    from seppo_fast.run import run as trained
    from seppo_fast.signals import StopSignals

    if (run / "final").exists():
        return
    make = partial(Watching, views=run.parent / "views", watched=updates, averaged=averaged,
                   draws=(DRAWS[-1], TIMES))

    def work(signals: StopSignals, lost: Callable[[str], None]) -> None:
        trained(load_config(config, changes), "auto", join(lost), signals, make)

    if status := carried_out(work, "the same command goes on"):
        sys.exit(status)
    for signum in (signal.SIGTERM, signal.SIGINT):  # the trainer's handlers would only note them
        signal.signal(signum, signal.SIG_DFL)


def main(work: Path, seed: int, method: str) -> None:
    """Make one run's result file."""
    settings, home = Settings(**json.loads((work / "settings.json").read_text())), work / f"seed_{seed}"
    report_run(work, seed, method, lambda: ablation.make_base(home, seed, settings) if method == BASE
               else train_and_judge(home, seed, method, settings))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
