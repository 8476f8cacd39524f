"""The steps that quickstarts share: their folder, their clock, and training by the literal command."""

import argparse
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import seppo_fast
from seppo_fast.errors import UserError

OURS = ".quickstart"  # marks a folder whose contents the quickstart may clear


def parser_of(program: str, about: str | None, out: str) -> argparse.ArgumentParser:
    """The command line: `--out`, by default `out`, and `--seed`."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for everything that is made")
    parser.add_argument("--seed", type=int, default=0, help="0 by default")
    return parser


def explained(main: Callable[..., int]) -> Callable[..., int]:
    """`main`, but a UserError is printed as its message, with exit status 2."""
    @wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(f"seppo_fast: {error}", file=sys.stderr)
            return 2

    return run


def own_folder(out: Path) -> None:
    """Makes `out` and marks it as the quickstart's; a UserError where it holds other files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not (out / OURS).exists():
            raise UserError(f"--out {out} holds other things, and the quickstart clears its folders there; choose an empty"
                            " or new folder")
        (out / OURS).touch()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another folder") from error


def overrides(out: Path, seed: int) -> list[str]:
    """The settings that a shipped configuration leaves open: the paths of model, data and run, and the seed."""
    paths = {
        "model.path": out / "base", "data.source": out / "demonstrations",
        "data.cache_dir": out / "cache", "output_dir": out / "run",
    }
    return [*(f"seppo.{key}={path}" for key, path in paths.items()), f"seppo.seed={seed}"]


def make_base_model(out: Path, heading: str, make: Callable[[Path], bool], seconds: dict[str, float]) -> None:
    """The base model in `out`/base; `make` says whether it was made, or was there already. Its time goes to `seconds`."""
    say(heading)
    with timed(seconds, "base"):
        if not make(out / "base"):
            print(f"{out / 'base'} was made by this code and these settings already: reused")


def align(out: Path, config: str, settings: Sequence[str], seconds: dict[str, float]) -> int:
    """The exit status of the training into `out`/run, with a message where it is not 0. Its time goes to `seconds`."""
    say("3/4  SePPO")
    with timed(seconds, "training"):
        return train_anew(out / "run", config, settings)


def train_anew(run: Path, config: str, settings: Sequence[str]) -> int:
    """The exit status of a training into `run`, which is emptied first, with a message where it is not 0."""
    # The trainer never overwrites a run folder, so an old one is removed here.
    shutil.rmtree(run, ignore_errors=True)
    status = train(config, [*settings, f"seppo.output_dir={run}"])
    if status:
        print(f"seppo_fast: the training ended with status {status}; its messages are above", file=sys.stderr)
    return status


def train(config: str, settings: Sequence[str]) -> int:
    """The exit status of `deepspeed seppo_fast/train.py --config CONFIG --set ...`; its output is passed on."""
    script = Path(seppo_fast.__file__).parent / "train.py"
    # One process and a free port: the result must not depend on the machine's NUMA nodes, nor the run fail beside another job.
    launcher = ["--num_gpus", "1", "--master_port", str(free_port())]
    command = [str(script), "--config", config, "--set", *settings]
    print("deepspeed", *launcher, *command, flush=True)
    return subprocess.run([sys.executable, "-m", "deepspeed.launcher.runner", *launcher, *command]).returncode


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Write the block's wall-clock seconds under `name`."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def where(seconds: Mapping[str, float], out: Path, pictures: Sequence[str]) -> str:
    """How long it took, and where everything is."""
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    shown = ", ".join(str(out / name) for name in pictures)
    return f"\nseconds: {stages}\npictures: {shown}\nfigures: {out / 'result.json'}"


def say(text: str) -> None:
    """A heading."""
    print(f"\n== {text}", flush=True)
