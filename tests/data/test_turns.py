"""Runs that share a cache: each file is made once, and a wait for another run ends with that run."""

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from seppo_fast.data.turns import in_turn
from seppo_fast.lock import locked


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], None]], int]]:
    """`fork(work)`: the number of a process that does it; killed at the end."""
    children: list[int] = []

    def start(work: Callable[[], None]) -> int:
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(0)
        children.append(child)
        return child

    yield start
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def maker(folder: Path, name: str, numbers: list[int]) -> Callable[[], None]:
    """Makes those files that are not there, and notes in `log` which."""
    arrows = {number: folder / "latents" / f"{number:05d}.arrow" for number in numbers}

    def work(number: int) -> None:
        if not arrows[number].exists():
            with open(folder / "log", "a") as log:
                log.write(f"{name}{number}\n")
            time.sleep(0.02)
            arrows[number].touch()

    return lambda: in_turn(arrows, work)


def noted(folder: Path) -> list[str]:
    return (folder / "log").read_text().split() if (folder / "log").exists() else []


def test_each_file_is_made_once_and_both_runs_end(fork: Callable, tmp_path: Path) -> None:
    for child in [fork(maker(tmp_path, name, list(range(8)))) for name in "ab"]:
        assert os.waitpid(child, 0)[1] == 0
    assert sorted(line[1:] for line in noted(tmp_path)) == [str(number) for number in range(8)]
    assert not list(tmp_path.rglob("*.lock"))


def test_it_waits_for_the_file_that_is_being_made_last_and_until_the_other_run_dies(
        fork: Callable, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    arrow = tmp_path / "latents" / "00000.arrow"
    arrow.parent.mkdir()

    def hold() -> None:
        with locked(arrow.with_suffix(".lock")):
            (tmp_path / "held").touch()
            time.sleep(60)

    holder = fork(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    second = fork(maker(tmp_path, "b", [0, 1, 2]))
    said = ""
    while "waiting" not in said:
        assert os.waitpid(second, os.WNOHANG) == (0, 0), "it did not wait"
        said += capfd.readouterr().err
        time.sleep(0.01)
    assert said.startswith(f"waiting for {arrow}, which another run is making: process {holder} on ")
    assert noted(tmp_path) == ["b1", "b2"]
    os.kill(holder, signal.SIGKILL)
    assert os.waitpid(second, 0)[1] == 0
    assert noted(tmp_path) == ["b1", "b2", "b0"] and said.count("waiting") == 1


def test_where_no_lock_can_be_had_it_works_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)  # as on a file system without it
    (tmp_path / "file").touch()
    done: list[int] = []
    in_turn({0: tmp_path / "file" / "00000.arrow", 1: tmp_path / "latents" / "00001.arrow"}, done.append)
    assert done == [0, 1] and not list(tmp_path.rglob("*.lock"))
