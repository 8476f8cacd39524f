"""One rank of a launch speaks, whichever fails first; and the next launch speaks, too."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, unranked

from seppo_fast.failure import PREFIX

FAIL = "from seppo_fast.failure import FirstFailure; f = FirstFailure(); {}; f.say('why'); f.close()"


def shell(script: str, folder: Path, **environment: str) -> str:
    """What a shell's commands print on stderr; `$FAIL` is a rank that fails, `$KILLED` one that is killed after it has spoken."""
    python = f"{sys.executable} -c"
    given = {"TMPDIR": str(folder), "FAIL": FAIL.format("pass"), "LATE": FAIL.format("import time; time.sleep(0.5)"),
             "KILLED": FAIL.format("f.say('why'); import os; os.kill(os.getpid(), 9)"), **environment}
    done = subprocess.run(["bash", "-c", script.replace("RUN", python)], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                          env=unranked() | given, timeout=60)
    return done.stderr


RANKS = {"WORLD_SIZE": "2", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "2"}


def test_twice_from_one_shell_and_each_launch_says_it_once(tmp_path: Path) -> None:
    launch = 'RANK=0 RUN "$FAIL" & RANK=1 RUN "$LATE" & wait;'
    assert shell(launch * 2, tmp_path, **RANKS).split() == ["why"] * 2
    assert list(tmp_path.iterdir()) == [], "nothing is left of it"


def test_after_a_launch_that_was_killed_the_next_one_speaks(tmp_path: Path) -> None:
    killed = '{ RANK=0 RUN "$KILLED" & RANK=1 RUN "$KILLED" & wait; } 2>/dev/null; '
    launch = 'RANK=0 RUN "$FAIL" & RANK=1 RUN "$LATE" & wait;'
    (tmp_path / "first").mkdir()
    assert "seppo-fast" in shell(killed + "ls $TMPDIR >&2", tmp_path / "first", **RANKS), "they leave their file"
    said = shell(killed + launch, tmp_path, **RANKS).splitlines()
    assert [line for line in said if "Killed" not in line] == ["why"]  # some shells report their children's end
    assert [file.name for file in tmp_path.iterdir()] == ["first"]


def test_a_rank_that_comes_when_the_first_has_left_is_silent(tmp_path: Path) -> None:
    assert shell('RANK=0 RUN "$FAIL"; RANK=1 RUN "$FAIL"; true', tmp_path, **RANKS).split() == ["why"]


def test_what_others_left_is_removed(tmp_path: Path) -> None:
    now = time.monotonic()
    for name, content in (("old", f"came {now - 1000}"), ("before_the_boot", f"came {now + 1000}"), ("empty", ""), ("torn", "came"),
                          ("new", f"came {now}")):
        (tmp_path / f"{PREFIX}{name}").write_text(f"{content}\nfailed 1\n")
        os.utime(tmp_path / f"{PREFIX}{name}", (time.time() - 1000,) * 2)  # somebody has set the clock: it says nothing
    assert shell('RANK=0 RUN "$FAIL" & RANK=1 RUN "$FAIL" & wait', tmp_path, **RANKS).split() == ["why"]
    assert [file.name for file in tmp_path.iterdir()] == [f"{PREFIX}new"]


def test_without_a_place_for_the_file_everybody_speaks(tmp_path: Path) -> None:
    output = shell('cd /; RANK=0 RUN "$FAIL" & RANK=1 RUN "$FAIL" & wait', tmp_path / "none", **RANKS, PYTHONPATH=str(ROOT))
    assert set(output.split()) == {"why"}


NO_THREADS = """
import os, resource, threading, time
from seppo_fast.failure import explained
resource.setrlimit(resource.RLIMIT_NPROC, (20, 20))
os.setuid(64_999)
try:
    while True:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
except RuntimeError as error:
    print(explained(error))
try:
    os.fork()
except OSError as error:
    print(explained(error), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user who has no processes yet")
def test_no_threads_left_is_said_as_that() -> None:
    done = subprocess.run([sys.executable, "-c", NO_THREADS], cwd=ROOT, text=True, capture_output=True, timeout=60)
    first, second = done.stdout.splitlines()
    assert first.startswith("rank 0 could not start a thread or process (can't start new thread): there are too many (ulimit -u")
    assert "[Errno 11] Resource temporarily unavailable" in second and "seppo.data.workers" in second
