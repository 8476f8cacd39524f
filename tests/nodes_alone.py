"""What must be the same on all machines is compared, and a rank that is gone ends the others. Here all machines are this one.

test_nodes.py runs this file in a process of its own: a process that has joined ranks already cannot fork other ones.
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import free_port

from seppo_fast import contact, nodes
from seppo_fast.errors import UserError
from seppo_fast.ranks import Ranks, join, leave

pytestmark = pytest.mark.slow
Work = Callable[[Ranks], str]


def on_three(work: Work, folder: Path) -> list[tuple[int, str]]:
    """What three ranks end with, each on a machine of its own name: exit status or minus a signal, and its words."""
    port, children = free_port(), []
    for rank in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                socket.gethostname = lambda rank=rank: "abc"[rank]
                os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT=port)
                ranks = join((folder / f"{rank}").write_text)
                try:
                    words = work(ranks)
                except UserError as error:
                    words = str(error)
                (folder / f"{rank}").write_text(words)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [(status, file.read_text() if (file := folder / f"{rank}").exists() else "") for rank, status in enumerate(statuses)]


def test_a_killed_rank_ends_the_others_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact, "GRACE", 0.1)

    def work(ranks: Ranks) -> str:
        ranks.barrier()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)  # as in NCCL's kernels: no collective of ours fails
        return "late"

    words = "lost contact with rank 1 on b, which ended: see what it printed; if nothing, it was killed (out of memory?)"
    assert on_three(work, tmp_path) == [(1, words), (-signal.SIGKILL, ""), (1, words)]


def test_every_connection_of_a_rank_is_asked_for_signs_of_life(tmp_path: Path) -> None:
    """gloo's too, by which two ranks may lose each other that both reach rank 0."""
    def work(ranks: Ranks) -> str:
        found = [connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) for connection in contact._connections()]
        return str(sorted({*found})) if len(found) >= 5 else f"only {len(found)} connections"  # two groups of two others, rank 0

    assert on_three(work, tmp_path) == [(0, "[30000, 60000]")] * 3


def test_who_leaves_in_order_ends_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contact, "GRACE", 0.1)

    def work(ranks: Ranks) -> str:
        ranks.barrier()
        if ranks.rank != 2:
            leave()
            return "left"
        time.sleep(1)
        return "late"

    assert on_three(work, tmp_path) == [(0, "left"), (0, "left"), (0, "late")]


def test_what_differs_is_named_with_values_and_machines(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> str:
        nodes.check_same("equal", {"size": 1}, ranks)
        try:
            nodes.check_programs(ranks, {"seppo": {"beta": 10.0 if ranks.rank == 1 else 20.0, "seed": 0}})
        except UserError as error:
            assert str(error).splitlines()[1:-1] == ["  the setting seppo.beta: 20.0 on a (rank 0), c (rank 2); 10.0 on b (rank 1)"]
        nodes.check_same("the model", {"unet": 1} if ranks.rank else {"unet": 1, "vae": 2}, ranks)
        return "not refused"

    said = f"the model is not the same on all machines:\n  vae: 2 on a (rank 0); missing on b (rank 1), c (rank 2)\n{nodes.SHARED}"
    assert on_three(work, tmp_path) == [(0, said)] * 3


def test_what_fails_on_one_machine_is_said_on_all(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> str:
        def fails() -> int:
            if ranks.rank > 0:
                raise UserError("no such file")
            return 7

        def fails_everywhere() -> int:
            raise UserError("nowhere")

        try:
            nodes.in_turn(ranks, fails_everywhere)
        except UserError as error:
            assert str(error) == "on a (rank 0): nowhere"
        assert nodes.in_turn(ranks, lambda: ranks.rank) == ranks.rank
        return str(nodes.agreed(ranks, fails))

    assert on_three(work, tmp_path) == [(0, "on b (rank 1), c (rank 2): no such file")] * 3


def test_folders_that_are_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "LAG", 0.1)
    for rank in range(3):
        (tmp_path / f"own{rank}").mkdir()

    def work(ranks: Ranks) -> str:
        nodes.check_shared({"run": tmp_path / "made" / "here", "nobody writes": Path("/proc")}, ranks)
        nodes.check_shared({"run": tmp_path / "made", "cache": tmp_path / f"own{ranks.rank}"}, ranks)
        return "not refused"

    done = on_three(work, tmp_path)
    for status, said in done:
        assert status == 0 and said.startswith("not shared by all machines:\n  cache "), said
        assert said.count("\n  ") == 1 and "not seen on b (rank 1), c (rank 2) is what a (rank 0) wrote to" in said
    assert [*tmp_path.rglob("*.tmp*"), *(tmp_path / "own0").iterdir()] == []


def test_ranks_by_machine() -> None:
    hosts = ["a"] * 4 + ["b"] * 4
    assert nodes.named(hosts, [0, 1, 2, 3, 5]) == "a (ranks 0-3), b (rank 5)"
    assert nodes.named(hosts, [5, 7]) == "b (ranks 5, 7)"
    assert nodes.named([str(i) for i in range(7)], range(7)).endswith("4 (rank 4) and 2 more machines")
