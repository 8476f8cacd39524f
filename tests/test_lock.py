"""Locks: one holder, who is named; nobody holds one after his death."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from seppo_fast.lock import Busy, locked

HOLD = """
import os, sys, time
from pathlib import Path
from seppo_fast.lock import locked
with locked(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)  # it has run what a fork runs in the child
        time.sleep(60)
        os._exit(0)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> tuple[subprocess.Popen, int]:
    """A process that holds `lock`, and a child of it that was forked meanwhile, as one that loads data is."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    yield process, child
    os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()


def test_the_second_is_told_who_holds_it_and_takes_it_after_a_kill_though_a_child_lives(
        holder: tuple[subprocess.Popen, int], tmp_path: Path) -> None:
    process, child = holder
    with pytest.raises(Busy) as busy, locked(tmp_path / "lock"):
        pass
    host = re.escape(socket.gethostname())
    assert re.fullmatch(rf"process {process.pid} on {host}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{{4}}", str(busy.value))
    process.kill()
    process.wait()
    os.kill(child, 0)
    with locked(tmp_path / "lock"):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


def test_it_is_given_back_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path / "lock"):
            raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_removed_or_made_anew_meanwhile_keeps_its_new_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder / "lock"):
        (folder / "lock").unlink()
        with locked(folder / "lock"):
            pass
    (folder / "lock").write_text("")
    with locked(folder / "lock"):
        (folder / "lock").unlink()
        folder.rmdir()
    with locked(tmp_path / "lock"):
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").write_text("somebody else's")
    assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"\xff\x00", b'{"host": 1}', b"{}"])
def test_a_file_that_names_nobody_is_no_obstacle_and_no_traceback(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(content)
    with locked(tmp_path / "lock"):
        (tmp_path / "lock").write_bytes(content)
        with pytest.raises(Busy, match="a process that .*lock does not name"), locked(tmp_path / "lock"):
            pass


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system that is mounted without it: there is none here."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_flock_one_holder_too(without_flock: None, tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        with pytest.raises(Busy, match=f"process {os.getpid()} on"), locked(tmp_path / "lock"):
            pass
        assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == []


def test_without_flock_a_dead_processs_lock_is_taken_and_another_machines_is_not(without_flock: None, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    gone = subprocess.Popen(["true"])
    gone.wait()
    # This process's number, of another process.
    earlier = {"host": socket.gethostname(), "pid": os.getpid(), "started": 1.0, "since": "long ago"}
    for owner in (earlier, earlier | {"pid": gone.pid}):
        path.write_text(json.dumps(owner))
        with locked(path):
            assert json.loads(path.read_text())["started"] != 1.0
    # On another machine, and in another container of this one: both cannot be seen from here.
    for owner in (earlier | {"host": "elsewhere"}, earlier | {"pid": gone.pid, "numbering": "pid:[1]"}):
        path.write_text(json.dumps(owner))
        with pytest.raises(Busy, match="on .*, since long ago") as busy, locked(path):
            pass
        assert busy.value.unproven and json.loads(path.read_text()) == owner


def test_a_run_is_told_how_to_remove_the_lock_of_a_machine_that_died(without_flock: None, tmp_path: Path) -> None:
    from seppo_fast.errors import UserError
    from seppo_fast.training.folder import LOCK, alone_in

    ranks: Any = SimpleNamespace(rank=0)
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "1", "since": "Monday"}))
    with pytest.raises(UserError, match=rf"process 7 on elsewhere, since Monday\. .* remove {tmp_path / LOCK} and start again"):
        with alone_in(tmp_path, ranks):
            pass
    (tmp_path / LOCK).unlink()
    with alone_in(tmp_path, ranks):  # a live one of this machine: no advice to remove what protects it
        with pytest.raises(UserError) as refused, alone_in(tmp_path, ranks):
            pass
    assert f"process {os.getpid()} on " in str(refused.value) and "remove" not in str(refused.value)
