"""Fixtures: a tiny Stable Diffusion directory, a folder of demonstrations, and three ways to train on them.

`train` runs in this process (seconds), `launch` runs the literal command through DeepSpeed's launcher, and
`train_on_ranks` runs several configurations one after the other on two ranks that are forked once.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forks, unranked
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ("seppo_fast/train.py",)
PROMPTS = ("a handwritten one", "a handwritten two", "a handwritten three")
TRAINS = {"train", "train_on_ranks", "launch", "start", "forks", "quick_compiler"}  # fixtures of slow tests
SLOW = 3.0  # seconds that a test may take in `make test-fast`
WAITING = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a second or two; `make test-fast` leaves it out")
    config.stash[WAITING] = 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, and count, what waits for a GPU; what uses a fixture that trains is slow."""
    waiting = [] if torch.cuda.is_available() else [item for item in items if waits_for_a_gpu(item)]
    if waiting:
        left_out = set(waiting)
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=waiting)
    config.stash[WAITING] = len(waiting)
    if hasattr(config, "workeroutput"):  # a worker of pytest-xdist
        config.workeroutput["waiting"] = len(waiting)
    for item in items:
        if TRAINS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


def waits_for_a_gpu(item: pytest.Item) -> bool:
    """Whether a mark skips it here for a reason that names a GPU."""
    marks = item.iter_markers("skipif")
    return any(mark.args and mark.args[0] is True and "GPU" in mark.kwargs.get("reason", "") for mark in marks)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects the same tests, so each counts all that wait."""
    waiting = getattr(node, "workeroutput", {}).get("waiting", 0)
    node.config.stash[WAITING] = max(node.config.stash[WAITING], waiting)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How many tests wait for a GPU, and which ones are slow without being marked so."""
    if waiting := config.stash[WAITING]:
        terminalreporter.write_line(f"{waiting} {'test waits' if waiting == 1 else 'tests wait'} for a GPU")
    if config.option.markexpr != "not slow":
        return
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call" and report.duration > SLOW:
            terminalreporter.write_line(f"{report.nodeid} took {report.duration:.0f} s: mark it with pytest.mark.slow")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and sums in another order would not repeat to the byte."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """DeepSpeed, caches and every run of ours collect garbage again and again: what is there already need not be searched."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Stable Diffusion pipeline directory: 16x16 pixels, 8x8x4 latents, a narrow UNet."""
    from tiny import NARROW, tiny_sd  # seconds, which a test without a model need not wait for

    return tiny_sd(tmp_path_factory.mktemp("models") / "sd", **NARROW)


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 24 random pictures with metadata.jsonl."""
    return make_demonstrations(tmp_path_factory.mktemp("demonstrations"), 24)


@pytest.fixture(scope="session")
def pickapic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Pick-a-Pic parquet file of 14 rows, two of which are ties."""
    from outcomes import write_pickapic

    return write_pickapic(tmp_path_factory.mktemp("pickapic") / "train.parquet", 14, ties=(3, 8))


def make_demonstrations(folder: Path, count: int) -> Path:
    """Write `count` random 20x24 pictures and their metadata.jsonl."""
    random = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for i in range(count):
            Image.fromarray(random.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            metadata.write(json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i % len(PROMPTS)]}) + "\n")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents are encoded once for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(sd: Path, demonstrations: Path, cache_dir: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A small, complete configuration; `settings(**{"seppo.beta": 10.0})` overrides by key path."""

    def make(**overrides: Any) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "seppo": {
                "model": {"path": str(sd)}, "output_dir": str(tmp_path / "run"), "iterations": 2, "updates_per_iteration": 2,
                "data": {"source": str(demonstrations), "resolution": 16, "cache_dir": str(cache_dir)},
                "sampler": {"steps": 3, "batch_size": 8, "guidance_scale": 2.0},
            },
        }
        for path, value in overrides.items():
            *parents, last = path.split(".")
            node = raw
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = value
        return deepcopy(raw)

    return make


@pytest.fixture(scope="session")
def quick_compiler() -> Iterator[None]:
    """PyTorch's compiler makes its CPU kernels without optimisation and in this process: a third of the time.

    What it compiles for and from is the same. Its probes of the processor, each a process that imports torch, are left out.
    The compiler's path is always the same: PyTorch keeps kernels and precompiled headers (200 MB) by it, in its own folder.
    """
    from torch._inductor import config

    folder = Path(tempfile.gettempdir()) / f"seppo_fast_tests_{os.getuid()}"
    folder.mkdir(exist_ok=True)
    compiler = folder / "g++"  # by this name the compiler's kind is known
    part = folder / f"g++.{os.getpid()}"  # another worker may be using it
    part.write_text(f'#!/bin/sh\nexec {config.cpp.cxx[-1]} "$@" -O0\n')  # the last -O is the one that counts
    part.chmod(0o755)
    part.rename(compiler)
    with config.patch({"cpp.cxx": (str(compiler),), "cpp.vec_isa_ok": False, "compile_threads": 1}):
        yield


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """This process as the only rank."""
    import estimates

    from seppo_fast.ranks import join, quiet_libraries

    quiet_libraries()
    estimates.remember(tmp_path_factory.mktemp("estimates"))
    return join()


@pytest.fixture
def train(ranks: Any) -> Any:
    """`train(raw, resume=None)` runs a configuration in this process and returns its run folder."""
    from seppo_fast.configfile import parse_config
    from seppo_fast.run import run
    from seppo_fast.signals import StopSignals

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}

    def here(raw: dict[str, Any], resume: str | None = None) -> Path:
        return run(parse_config(raw), resume, ranks, StopSignals()).parent

    yield here
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`launch(raw_or_name, *arguments, ranks=1)` runs `deepspeed seppo_fast/train.py` and returns the finished process; with
    `program` another one, or `--module` and a module's name."""
    return lambda raw, *arguments, ranks=1, program=PROGRAM: subprocess.run(
        command(raw, *arguments, ranks=ranks, folder=tmp_path, program=program), cwd=ROOT, text=True, capture_output=True,
        timeout=280, env=unranked())


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Like `launch`, without waiting; with `ranks=None` train.py is started directly, so that signals reach it."""
    started = []

    def begin(raw: Any, *arguments: str, ranks: int | None = None) -> subprocess.Popen:
        process = subprocess.Popen(command(raw, *arguments, ranks=ranks, folder=tmp_path), cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=unranked())
        started.append(process)
        return process

    yield begin
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def command(raw: dict[str, Any] | str, *arguments: str, ranks: int | None, folder: Path, program: tuple[str, ...] = PROGRAM
            ) -> list[str]:
    """The command line for a configuration (a dictionary, or a shipped file's name)."""
    if isinstance(raw, dict):
        file = folder / f"config-{len(list(folder.glob('config-*.json')))}.json"
        file.write_text(json.dumps(raw))
        raw = str(file)
    launcher = [] if ranks is None else ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", free_port()]
    return [sys.executable, *launcher, *program, "--config", raw, *arguments]


def free_port() -> str:
    """A TCP port that nobody listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Forks]:
    """A process that has imported everything and forks the ranks of each run; pytest-xdist's workers share it."""
    server = Forks(tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None)
    pytestconfig.add_cleanup(server.wait)  # not here, where the time of the last test would run out
    yield server
    server.close()


@pytest.fixture
def train_on_ranks(forks: Forks) -> Callable[..., list[Path]]:
    """`train_on_ranks([raw, ...], ranks=2)` runs all configurations on the same ranks and returns their run folders."""

    def run_all(raws: list[dict[str, Any]], ranks: int = 2) -> list[Path]:
        done = forks.run(raws, ranks=ranks, timeout=280, module="run_jobs")
        assert done.statuses == [0] * ranks, done.output[-6000:]
        return [Path(raw["seppo"]["output_dir"]) for raw in raws]

    return run_all
