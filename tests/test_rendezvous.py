"""Ranks of one launch find one another, and give up with the names of those who did not come."""

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch.distributed as dist
from conftest import free_port

from seppo_fast.errors import UserError
from seppo_fast.rendezvous import Launch, launched, meet, within


class Rank:
    """A forked process that meets the others, and stays; `words` is what became of it."""

    def __init__(self, work: Callable[[], str]) -> None:
        self.output, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                words = work()
            except BaseException as error:
                words = f"{type(error).__name__}: {error}"
            os.write(theirs, words.encode())
            signal.pause()  # rank 0 holds the store of the others
        os.close(theirs)

    def words(self) -> str:
        assert select.select([self.output], [], [], 30)[0], "it hangs"
        return os.read(self.output, 10_000).decode()

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.output)


@pytest.fixture
def start() -> Iterator[Callable[..., Rank]]:
    """`start(rank, world, port, seconds)`: a rank that says "met" and the store's common word, and stays until the end."""
    store = None
    with ExitStack() as ends:

        def begin(rank: int, world: int, port: int, seconds: float = 20) -> Rank:
            def work() -> str:
                nonlocal store  # it is rank 0's, and must outlive the function
                store = meet(Launch(rank, world, rank, world, "127.0.0.1", port), seconds)
                store.set(f"{rank}", "here")
                return "met " + b" ".join(store.get(f"{other}") for other in range(world)).decode()

            process = Rank(work)
            ends.callback(process.end)
            return process

        yield begin


def test_all_come(start: Callable[..., Rank]) -> None:
    port = int(free_port())
    ranks = [start(rank, 3, port) for rank in (2, 0, 1)]
    assert {rank.words() for rank in ranks} == {"met here here here"}


def test_who_does_not_come_is_named_with_the_address(start: Callable[..., Rank]) -> None:
    port = int(free_port())
    first = start(0, 4, port, 2)
    missing = f"UserError: rank 2, rank 3 did not come to MASTER_ADDR:MASTER_PORT 127.0.0.1:{port} for"
    assert start(1, 4, port, 1).words().startswith(f"{missing} 1 seconds")
    assert first.words().startswith(f"{missing} 2 seconds")


def test_rank_0_does_not_come(start: Callable[..., Rank]) -> None:
    port = int(free_port())
    assert start(1, 2, port, 1).words().startswith(
        f"UserError: rank 1 found no rank 0 at MASTER_ADDR:MASTER_PORT 127.0.0.1:{port} for 1 seconds")


def test_a_port_in_use_is_said_as_that_and_nobody_hangs_there(start: Callable[..., Rank]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert start(0, 2, port).words() == (f"UserError: MASTER_PORT {port} is in use on this machine, perhaps by another run:"
                                             " choose another port (--master_port)")
        assert start(1, 2, port, 1).words().startswith("UserError: rank 1 found no rank 0 at")


def test_another_run_meets_there(start: Callable[..., Rank]) -> None:
    port = int(free_port())
    ranks = [start(rank, 2, port) for rank in (0, 1)]
    assert {rank.words() for rank in ranks} == {"met here here"}
    for rank in (1, 2):
        assert start(rank, 3, port).words().startswith("UserError: at MASTER_ADDR:MASTER_PORT 127.0.0.1:"), rank


def test_a_machine_that_came_later_meets_the_others_again(start: Callable[..., Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's process keeps the store over restarts, and the restarts that each machine counts are its own."""
    store = dist.TCPStore("127.0.0.1", int(free_port()), 2, True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for restarts in ((0, 0), (1, 0)):
        ranks = []
        for rank in (1, 0):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts[rank]))
            ranks.append(start(rank, 2, store.port))
            time.sleep(0.3)  # rank 1 comes first, and finds the attempt before
        assert {rank.words() for rank in ranks} == {"met here here"}


def test_a_signal_is_heard_while_the_others_are_waited_for() -> None:
    def work() -> str:
        signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyError("heard")))
        return str(meet(Launch(1, 2, 1, 2, "127.0.0.1", int(free_port())), 60))

    waiting = Rank(work)
    try:
        while not select.select([waiting.output], [], [], 0.2)[0]:
            os.kill(waiting.pid, signal.SIGTERM)
        assert waiting.words() == "KeyError: 'heard'"
    finally:
        waiting.end()


def test_what_hangs_is_left_and_errors_come_through() -> None:
    with pytest.raises(UserError, match="too long"):
        within(0.01, lambda: time.sleep(5), lambda: "too long")
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0, lambda: "too long")
    assert within(5, lambda: "done", lambda: "too long") == "done"


GOOD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("change", "words"), [
    ({"RANK": "one"}, "are numbers: .*'one'"), ({"WORLD_SIZE": ""}, "WORLD_SIZE not: unset RANK"),
    ({"RANK": "2"}, "RANK 2, WORLD_SIZE 2"),
    ({"MASTER_PORT": "70000"}, "ports end at 65535"), ({"MASTER_ADDR": "", "LOCAL_RANK": ""}, "LOCAL_RANK and MASTER_ADDR not"),
    ({"LOCAL_WORLD_SIZE": "x"}, "are numbers"), ({"LOCAL_RANK": "-1"}, "ranks count from 0"),
])
def test_variables_that_say_no_launch(change: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    assert launched() == Launch(1, 2, 1, 2, "host", 29500)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        launched()
