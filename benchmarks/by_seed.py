"""Benchmarks that train on several seeds: the folder of their runs, and the processes that make them.

    WORK/settings.json          the settings of all runs in WORK
    WORK/seed_0/METHOD/         the trainer's run folder
    WORK/seed_0/METHOD.json     its result file; it appears when the run is finished
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from benchmarks import ROOT
from seppo_fast.errors import UserError

WORKERS = 2
Run = dict[str, Any]  # seed, method, points, and what a benchmark adds


def result_file(work: Path, seed: int, method: str) -> Path:
    return work / f"seed_{seed}" / f"{method}.json"


def unfinished(work: Path, seeds: Iterable[int], methods: Sequence[str]) -> list[tuple[int, str]]:
    """The runs of these seeds and methods that have no result file yet, in the order in which they are made."""
    return [(seed, method) for seed in seeds for method in methods if not result_file(work, seed, method).exists()]


def report_run(work: Path, seed: int, method: str, make: Callable[[], dict[str, Any]]) -> None:
    """Make a run, and write its result file with what it took."""
    from benchmarks.result_files import commit

    started, file = time.perf_counter(), result_file(work, seed, method)
    file.parent.mkdir(exist_ok=True)
    made = make()
    about = {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": round(time.process_time(), 1), "commit": commit()}
    unready = file.with_suffix(".tmp")
    unready.write_text(json.dumps({"seed": seed, "method": method, **made, **about}) + "\n")
    unready.replace(file)


def assignments(changes: Mapping[str, object]) -> list[str]:
    """Settings as the trainer's --set takes them."""
    return [f"{key}={value}" for key, value in changes.items()]


def training(home: Path, seed: int, method: str, batch_size: int, updates: int) -> dict[str, object]:
    """What every training in a seed's folder changes in a configuration: its batch, its length, its places, its seed."""
    return {
        "train_batch_size": batch_size, "train_micro_batch_size_per_gpu": batch_size, "scheduler.params.total_num_steps": updates,
        "seppo.model.path": home / "base", "seppo.data.source": home / "pairs.parquet", "seppo.data.cache_dir": home / "cache",
        "seppo.output_dir": home / method, "seppo.seed": seed,
    }


def iterations(method: str, iterations: int, updates: int) -> dict[str, object]:
    """The length of a training in iterations. SFT has no pool: its past policies are those of its checkpoints."""
    return {"seppo.iterations": iterations, "seppo.updates_per_iteration": updates,
            "seppo.checkpoint.keep_last": iterations if method == "sft" else 1}


def policy_file(run: Path, method: str, k: int, updates: int) -> Path:
    """The weights of a run's policy after iteration k."""
    return run / (f"checkpoints/update_{k * updates:08d}/policy.safetensors" if method == "sft"
                  else f"pool/policy_{k:05d}.safetensors")


def train(run: Path, config: str, changes: Sequence[str]) -> None:
    """Train into `run`, from where an earlier attempt stopped. The process ends here when the trainer stops early."""
    from seppo_fast import train

    if (run / "final").exists():
        return
    # Called in this process: a process of its own would import all again, a twelfth of the time.
    sys.argv = ["seppo_fast/train.py", "--config", config, "--resume", "auto", "--set", *changes]
    status = train.main()
    if not (run / "final").exists():  # stopped by a signal; there is a checkpoint
        sys.exit(status or 1)
    for signum in (signal.SIGTERM, signal.SIGINT):  # the trainer's handlers would only note them
        signal.signal(signum, signal.SIG_DFL)


def parser_of(name: str, about: str | None, methods: Sequence[str], settings: Any, first_seed: int = 0
              ) -> argparse.ArgumentParser:
    """The command line of benchmarks.NAME."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for the table, the figures and {name}.json")
    parser.add_argument("--work", type=Path, default=Path("runs") / name, help=f"folder of the runs (default: runs/{name})")
    parser.add_argument("--seeds", type=int, default=5,
                        help=f"number of seeds: {first_seed}, {first_seed + 1}, ... (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(methods), metavar="METHOD",
                        help=f"any of {', '.join(methods)} (default: all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                        help=f"other settings: {' '.join(f'{key}={value}' for key, value in numbers(settings).items())}")
    return parser


def checked(given: argparse.Namespace, methods: Sequence[str], settings: Any) -> argparse.Namespace:
    """The arguments with `settings` changed as asked, the methods in order, and --out made; a UserError names a bad one."""
    if given.seeds < 1:
        raise UserError(f"--seeds {given.seeds}: at least one is needed, and two for an interval")
    if unknown := [method for method in given.methods if method not in methods]:
        raise UserError(f"--methods {' '.join(unknown)}: not known; there are {', '.join(methods)}")
    given.methods = [method for method in methods if method in given.methods]
    given.settings = changed(settings, given.set)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {given.out}: {error.strerror}; choose another folder") from error
    return given


def numbers(settings: Any) -> dict[str, Any]:
    """The settings that can be changed."""
    return {key: value for key, value in asdict(settings).items() if not isinstance(value, str)}


def changed(settings: Any, changes: Sequence[str]) -> Any:
    """The settings, a dataclass of positive numbers (and perhaps a name, which stays), with these `key=value`."""
    kinds, values = {key: type(value) for key, value in numbers(settings).items()}, {}
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
    return replace(settings, **values)


def open_work(work: Path, settings: Any) -> None:
    """Make the folder of the runs, or check that its runs were made with these settings."""
    file, ours = work / "settings.json", asdict(settings)
    try:
        work.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(path.name != ".lock" for path in work.iterdir()):
                raise UserError(f"--work {work} holds other things; choose an empty or new folder")
            file.write_text(json.dumps(ours, indent=1) + "\n")
        there = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--work {work}: {error}; choose another folder") from error
    differing = [f"{key} {there.get(key)} there, {value} now" for key, value in ours.items() if there.get(key) != value]
    if differing:
        raise UserError(f"--work {work} was begun with other settings ({'; '.join(differing)}): choose another folder")


@contextmanager
def alone_in(work: Path) -> Iterator[IO[str]]:
    """The open lock of the folder. The runs inherit it, so that the runs of a killed command hold it until they end."""
    with (work / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--work {work} is in use by another process of this command; wait for its end") from None
        yield lock


@dataclass
class Workers:
    """Makes runs, each in its own process of one thread, `python -m MODULE WORK SEED METHOD`. Each thread of the caller's pool
    waits for one."""

    module: str
    work: Path
    lock: IO[str]
    running: set[subprocess.Popen] = field(default_factory=set)
    stopped: bool = False

    def make(self, seed: int, method: str) -> dict[str, Any]:
        """The result of one run. When it fails, a UserError with the end of its log."""
        file = result_file(self.work, seed, method)
        log = file.with_suffix(".log")
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", self.module, str(self.work), str(seed), method]
        with log.open("a") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, pass_fds=[self.lock.fileno()],
                                       env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
            self.running.add(process)
            if self.stopped:  # since this thread started
                process.terminate()
            process.wait()
            self.running.discard(process)
        if not file.exists():
            end = log.read_text(errors="replace").strip()[-1500:]
            raise UserError(f"seed {seed}, {method}, ended with status {process.returncode}; its log {log} ends with:\n{end}")
        return json.loads(file.read_text())

    def stop(self) -> None:
        """Ask the running processes to stop. The trainer leaves a checkpoint."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def make_all(todo: Sequence[tuple[int, str]], make: Callable[[int, str], dict[str, Any]], stop: Callable[[], None]) -> None:
    """Make the runs, `WORKERS` side by side. A failure or an interruption stops the others."""
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


def made(module: str, work: Path, seeds: Sequence[int], stages: Iterable[Sequence[str]]) -> bool:
    """Make what is unfinished, stage by stage: each needs the results of those before it. False when interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with alone_in(work) as lock:
            for stage in stages:
                workers = Workers(module, work, lock)
                make_all(unfinished(work, seeds, stage), workers.make, workers.stop)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return False
    return True


def result_of(work: Path, seeds: Sequence[int], methods: Sequence[str], settings: Any, about: Mapping[str, Any], started: float,
              more: Sequence[tuple[int, str]] = ()) -> dict[str, Any]:
    """What the JSON of a benchmark holds; `started`, by the performance counter, is when the command began. `more`: runs that not
    every seed has."""
    names = [*((seed, method) for method in methods for seed in seeds), *more]
    runs = [json.loads(result_file(work, *name).read_text()) for name in names]
    # Of a run that was interrupted, the seconds of its last process alone.
    seconds = {"runs": sum(run["seconds"] for run in runs), "processor": sum(run["cpu_seconds"] for run in runs),
               "command": time.perf_counter() - started}
    return dict(about) | {
        "settings": asdict(settings) | {"seeds": len(seeds), "side_by_side": WORKERS, "threads_of_each": 1},
        "seconds": {name: round(value) for name, value in seconds.items()},
        "commits_of_runs": sorted({run["commit"] for run in runs}), "runs": runs,
    }
