"""The folder of the ablation's runs, and the processes that make them."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks import ROOT
from benchmarks.ablation.runs import BASE, Settings, result_file
from seppo_fast.errors import UserError

WORKERS = 2
OF_BASES = ("vae_steps", "text_steps", "unet_steps", "guidance_scale", "judge_samples", "judge_steps")


def open_work(work: Path, settings: Settings) -> None:
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


def take_bases(work: Path, other: Path, seeds: int, settings: Settings) -> None:
    """Link the base models of another folder of runs. A base model depends on its recipe and its judge alone."""
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
    """The open lock of the folder. The runs inherit it, so that the runs of a killed command hold it until they end."""
    with (work / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--work {work} is in use by another process of this command; wait for its end") from None
        yield lock


@dataclass
class Workers:
    """Makes runs, each in its own process of one thread. Each thread of the caller's pool waits for one."""

    work: Path
    lock: IO[str]
    running: set[subprocess.Popen] = field(default_factory=set)
    stopped: bool = False

    def make(self, seed: int, method: str) -> dict[str, Any]:
        """The result of one run. When it fails, a UserError with the end of its log."""
        file = result_file(self.work, seed, method)
        log = file.with_suffix(".log")
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.ablation.runs", str(self.work), str(seed), method]
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
