"""The paper's Table 4 and Figures 2 and 3 in form, on digits: `python -m benchmarks.ablation --out benchmarks/results`.

Every seed has a base model, data and trainings of its own, each by the trainer's own command in the quickstart's configuration.
Writes ablation.json, ablation_table.md, ablation_figure2.png and ablation_figure3.png. What is finished in --work is kept: the same
command goes on after an interruption, and one with more seeds or methods adds to it. `--set lr=1e-4 beta=500` with another --work
and --out, perhaps with few --seeds and --methods, is for finding the reason of a result; `--bases` spares it the bases.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from benchmarks.ablation_runs import BASE, METHODS, Settings, result_file, unfinished
from benchmarks.loop import ROOT
from seppo_fast.errors import UserError
from seppo_fast.quickstart.steps import explained

WORKERS = 2
OF_BASES = ("vae_steps", "text_steps", "unet_steps", "guidance_scale", "judge_samples", "judge_steps")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with `set` as Settings."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the table, the figures and ablation.json")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--bases", type=Path, metavar="WORK", help="another --work, whose bases and data are used")
    parser.add_argument("--seeds", type=int, default=5, help="how many: 0, 1, ... (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=f"of {', '.join(METHODS)}")
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


def open_work(work: Path, settings: Settings) -> None:
    """Make the folder of the runs, or make sure that what is in it was made with these settings."""
    file, wanted = work / "settings.json", asdict(settings)
    try:
        work.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(path.name != ".lock" for path in work.iterdir()):
                raise UserError(f"--work {work} holds other things; choose an empty or new folder")
            file.write_text(json.dumps(wanted, indent=1) + "\n")
        there = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--work {work}: {error}; choose another folder") from error
    differing = [f"{key} {there.get(key)} there, {value} now" for key, value in wanted.items() if there.get(key) != value]
    if differing:
        raise UserError(f"--work {work} was begun with other settings ({'; '.join(differing)}): choose another folder")


def take_bases(work: Path, other: Path, seeds: int, settings: Settings) -> None:
    """Link the bases that another folder of runs has: a base depends on its recipe and its judge alone."""
    try:
        there = json.loads((other / "settings.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--bases {other}: {error}; give the --work of an earlier command") from error
    differing = [f"{key} {there.get(key)} there, {getattr(settings, key)} now" for key in OF_BASES
                 if there.get(key) != getattr(settings, key)]
    if differing:
        raise UserError(f"--bases {other}: its bases were made or judged otherwise ({'; '.join(differing)})")
    for seed in range(seeds):
        here, finished = result_file(work, seed, BASE), result_file(other, seed, BASE)
        if finished.exists() and not here.exists():
            here.parent.mkdir(exist_ok=True)
            for name in ("base", "pairs.parquet"):
                (here.parent / name).symlink_to((finished.parent / name).resolve())
            here.write_text(finished.read_text())


@contextmanager
def alone_in(work: Path) -> Iterator[IO[str]]:
    """The open lock of the folder. The runs inherit it: those of a command that was killed hold it until they end."""
    with (work / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--work {work} is in use by another process of this command; wait for its end") from None
        yield lock


@dataclass
class Workers:
    """Runs in processes of their own, one thread each, as many side by side as there are threads in the pool."""

    work: Path
    lock: IO[str]
    living: set[subprocess.Popen] = field(default_factory=set)
    stopped: bool = False

    def make(self, seed: int, method: str) -> dict[str, Any]:
        """The result of one run; a UserError with its last words when it fails."""
        file = result_file(self.work, seed, method)
        log = file.with_suffix(".log")
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.ablation_runs", str(self.work), str(seed), method]
        with log.open("a") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, pass_fds=[self.lock.fileno()],
                                       env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
            self.living.add(process)
            if self.stopped:  # between this thread's start and now
                process.terminate()
            process.wait()
            self.living.discard(process)
        if not file.exists():
            last = log.read_text(errors="replace").strip()[-1500:]
            raise UserError(f"seed {seed}, {method}, ended with status {process.returncode}; its log {log} ends with:\n{last}")
        return json.loads(file.read_text())

    def stop(self) -> None:
        """Ask the living ones to stop; the trainer leaves a checkpoint."""
        self.stopped = True
        for process in list(self.living):
            process.terminate()


def make_all(todo: Sequence[tuple[int, str]], make: Callable[[int, str], dict[str, Any]], stop: Callable[[], None]) -> None:
    """Make the runs, `WORKERS` side by side; at the first failure or an interruption the others are stopped."""
    started = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for number, done in enumerate(as_completed([pool.submit(make, *run) for run in todo]), 1):
                run = done.result()
                last = {key: round(value, 3) for key, value in run["points"][-1].items()}
                print(f"{number}/{len(todo)} after {(time.perf_counter() - started) / 60:.1f} min: seed {run['seed']},"
                      f" {run['method']} {last}, {run['cpu_seconds']:.0f} s of a processor", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise


def result_of(work: Path, seeds: int, methods: Sequence[str], settings: Settings, about: dict[str, Any]) -> dict[str, Any]:
    """What ablation.json holds."""
    runs = [json.loads(result_file(work, seed, method).read_text()) for method in (BASE, *methods) for seed in range(seeds)]
    # Of a run that was interrupted, what its last process took.
    seconds = {"runs": sum(run["seconds"] for run in runs), "processor": sum(run["cpu_seconds"] for run in runs)}
    return about | {
        "settings": asdict(settings) | {"seeds": seeds, "side_by_side": WORKERS, "threads_of_each": 1},
        "seconds": {name: round(value) for name, value in seconds.items()},
        "commits_of_runs": sorted({run["commit"] for run in runs}), "runs": runs,
    }


@explained
def main(argv: list[str] | None = None) -> int:
    """Make what is unfinished and report everything. Exit status: 0, 2 with a message, 130 when interrupted."""
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
            from benchmarks.ablation_plots import figures  # seconds, which bad input need not wait for
            from benchmarks.ablation_report import report
            from benchmarks.throughput import about

            said, started = about("cpu"), time.perf_counter()
            # The bases first, for all else needs them; SFT, the shortest, last, so that both workers end at about the same time.
            for stage in ([BASE], given.methods[::-1]):
                workers = Workers(work, lock)
                make_all(unfinished(work, given.seeds, stage), workers.make, workers.stop)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    result = result_of(work, given.seeds, given.methods, given.settings, said)
    result["seconds"]["command"] = round(time.perf_counter() - started)
    (out / "ablation.json").write_text(json.dumps(result, indent=1) + "\n")
    figures(out, result)
    text = report(result)
    (out / "ablation_table.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
