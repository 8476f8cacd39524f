"""The paper's Table 4 and Figures 2 and 3 for a toy of digits: `python -m benchmarks.ablation --out benchmarks/results`.

Each seed has its own base model, data and trainings, by the trainer's own command with the quickstart's configuration.
Writes ablation.json, ablation_table.md, ablation_figure2.png and ablation_figure3.png. Finished runs in --work are kept: after an
interruption the same command continues, and with more seeds or methods it adds runs. To look for the reason of a result, use
`--set lr=1e-4 beta=500` with another --work and --out, perhaps with few --seeds and --methods. `--bases` then takes the base models
of an earlier --work.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.ablation.runs import BASE, METHODS, Settings, result_file, unfinished
from benchmarks.ablation.work import WORKERS, Workers, alone_in, make_all, open_work, take_bases
from seppo_fast.errors import UserError
from seppo_fast.quickstart.steps import explained


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The checked command line; `settings` are made from --set."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the table, the figures and ablation.json")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--bases", type=Path, metavar="WORK", help="another --work, whose base models and data are used")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds: 0, 1, ... (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD",
                        help=f"any of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                        help=f"other settings: {' '.join(f'{key}={value}' for key, value in asdict(Settings()).items())}")
    given = parser.parse_args(argv)
    if given.seeds < 1:
        raise UserError(f"--seeds {given.seeds}: at least one is needed, and two for an interval")
    if unknown := [method for method in given.methods if method not in METHODS]:
        raise UserError(f"--methods {' '.join(unknown)}: not known; there are {', '.join(METHODS)}")
    given.methods = [method for method in METHODS if method in given.methods]
    given.settings = with_changes(given.set)
    return given


def with_changes(changes: Sequence[str]) -> Settings:
    """The settings with these `key=value`."""
    kinds, values = {each.name: type(each.default) for each in fields(Settings)}, {}
    for change in changes:
        key, _, text = change.partition("=")
        if key not in kinds:
            raise UserError(f"--set {change}: there is no {key!r}; there are {', '.join(kinds)}")
        try:
            values[key] = kinds[key](text)
        except ValueError:
            values[key] = 0
        if not 0 < values[key] < float("inf"):
            raise UserError(f"--set {change}: {key} must be a positive {'integer' if kinds[key] is int else 'number'}")
    return Settings(**values)


def result_of(work: Path, seeds: int, methods: Sequence[str], settings: Settings, about: dict[str, Any]) -> dict[str, Any]:
    """What ablation.json holds."""
    runs = [json.loads(result_file(work, seed, method).read_text()) for method in (BASE, *methods) for seed in range(seeds)]
    # Of a run that was interrupted, the seconds of its last process alone.
    seconds = {"runs": sum(run["seconds"] for run in runs), "processor": sum(run["cpu_seconds"] for run in runs)}
    return about | {
        "settings": asdict(settings) | {"seeds": seeds, "side_by_side": WORKERS, "threads_of_each": 1},
        "seconds": {name: round(value) for name, value in seconds.items()},
        "commits_of_runs": sorted({run["commit"] for run in runs}), "runs": runs,
    }


@explained
def main(argv: list[str] | None = None) -> int:
    """Make the unfinished runs and report all. Exit status: 0, 2 with a message, 130 when interrupted."""
    given = arguments(argv)
    out, work = given.out, given.work.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another folder") from error
    open_work(work, given.settings)
    if given.bases:
        take_bases(work, given.bases, given.seeds, given.settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with alone_in(work) as lock:
            from benchmarks.ablation.plots import figures  # this takes seconds, and bad input is refused before
            from benchmarks.ablation.report import report
            from benchmarks.result_files import about

            measured_on, started = about("cpu", "diffusers", "deepspeed"), time.perf_counter()
            # The bases come first, because all other runs need them. SFT, the shortest, comes last, so that both workers end at
            # about the same time.
            for stage in ([BASE], given.methods[::-1]):
                workers = Workers(work, lock)
                make_all(unfinished(work, given.seeds, stage), workers.make, workers.stop)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130
    result = result_of(work, given.seeds, given.methods, given.settings, measured_on)
    result["seconds"]["command"] = round(time.perf_counter() - started)
    (out / "ablation.json").write_text(json.dumps(result, indent=1) + "\n")
    figures(out, result)
    text = report(result)
    (out / "ablation_table.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
