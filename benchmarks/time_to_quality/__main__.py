"""What cheaper rollouts cost the result: `python -m benchmarks.time_to_quality --out benchmarks/results`.

Trains with the paper's rollouts (50 guided steps) and with each way of making them cheaper, from the same base model, data and
noise; judges the policies on the way, and sets their quality beside the FLOPs that the trainer's plan counts. `drawn` compares what
the ways draw with the base. `timed`, made last and alone, measures the seconds of an update of each way in turn; without it no
seconds are reported, because each run has another one beside it. `--task` chooses the model and the data. Writes
time_to_quality_TASK.json, _table.md and .png. Finished runs in --work are kept: after an interruption the same command continues,
and with more seeds or methods it adds runs. `--bases` takes the base models of another --work, also of the ablation's. Seeds from
10 on were used to choose settings.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablation.runs import RECIPE, check_bases, link_base
from benchmarks.by_seed import checked, made, open_work, parser_of, result_file, result_of
from benchmarks.time_to_quality.ways import (
    ADAPTER,
    BASE,
    DISTILLED,
    DRAWN,
    PAPER,
    TASKS,
    TIMED,
    Settings,
    judged_iterations,
)
from seppo_fast.errors import UserError
from seppo_fast.quickstart.steps import explained


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked command line; `settings` are the task's, changed by --set. `paper` is always made: all is compared with it."""
    every = list(dict.fromkeys(name for task in TASKS.values() for name in task.methods))
    parser = parser_of("time_to_quality", __doc__, every, Settings())
    parser.add_argument("--task", choices=TASKS, default="digits", help="what is trained on what (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="0 by default; 10 and more were used to choose settings")
    parser.add_argument("--bases", type=Path, metavar="WORK", help="another --work, whose base models and data are used")
    parser.set_defaults(work=None, methods=None)
    given = parser.parse_args(argv)
    task = TASKS[given.task]
    given.name = f"time_to_quality_{given.task}"
    given.work = given.work or Path("runs") / given.name
    given.methods = task.methods if given.methods is None else [PAPER, *given.methods]
    checked(given, task.methods, task.settings)
    if len(judged_iterations(given.settings)) < 2:
        raise UserError(f"--set judged_every={given.settings.judged_every}: at least two of {given.settings.iterations} policies"
                        " are to be judged, because a run ends at the mean of two; choose a smaller number")
    return given


@explained
def main(argv: list[str] | None = None) -> int:
    """Make the unfinished runs and report all. Exit status: 0, 2 with a message, 130 when interrupted."""
    given = arguments(argv)
    out, work, ways = given.out, given.work.resolve(), TASKS[given.task].ways
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    open_work(work, given.settings)
    if given.bases:
        take_bases(work, given.bases, seeds, given.settings)
    from benchmarks.result_files import about  # this takes seconds, and bad input is refused before
    from benchmarks.time_to_quality.plots import front
    from benchmarks.time_to_quality.report import report

    began, started = about("cpu", "diffusers", "deepspeed"), time.perf_counter()
    every_way = {DRAWN, TIMED} & {*given.methods}  # these look at all of them
    adapters = [DISTILLED] if every_way or any(ways[name].adapter for name in given.methods) else []
    each, timed = [name for name in given.methods if name != TIMED], [TIMED] if TIMED in given.methods else []
    module = "benchmarks.time_to_quality.runs"
    # Each needs what comes before it; the longest runs come first, so that both workers end at about the same time.
    if not (made(module, work, seeds, ([BASE], adapters, each)) and made(module, work, seeds[:1], [timed])):
        return 130
    result = result_of(work, seeds, (BASE, *adapters, *each), given.settings, began, started,
                       [(seeds[0], name) for name in timed])
    (out / f"{given.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    front(out / f"{given.name}.png", result)
    text = report(result)
    (out / f"{given.name}_table.md").write_text(text)
    print(text)
    return 0


def take_bases(work: Path, other: Path, seeds: Sequence[int], settings: Settings) -> None:
    """Link the bases that another folder of runs has, and their adapters, if they were distilled there."""
    check_bases(other, settings, (*RECIPE, "guidance_scale"))
    for seed in seeds:
        there, here = result_file(other, seed, BASE), work / f"seed_{seed}"
        if not there.exists() or (here / "base").exists():
            continue
        link_base(here, there.parent)
        made_there = result_file(other, seed, DISTILLED)
        if made_there.exists():
            (here / ADAPTER).symlink_to((there.parent / ADAPTER).resolve())
            result_file(work, seed, DISTILLED).write_text(made_there.read_text())


if __name__ == "__main__":
    sys.exit(main())
