"""The command without its start-up time: a process that has imported everything, and forks the ranks of each run.

`Forks().run(raw, ...)` calls train.py's `main()` in fresh processes with the environment that DeepSpeed's launcher makes, a
process group a run. `strike` makes rank `rank` send a signal at an exact place: at the `number`-th call of `function`, before
or after it. SIGKILL goes to the whole group, as when a machine goes down; anything else to that rank alone.
`Forks().run_both(raw, ...)` starts the same command twice.
"""

import ctypes
import faulthandler
import fcntl
import functools
import gc
import importlib
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
READY = "ready\n"


@dataclass(frozen=True)
class Strike:
    """A signal at an exact place; `function` as "package.module:Class.method". `alone`: SIGKILL to this rank only.

    With `seconds` it comes so much later than the place; without a `function`, than the start.
    """

    function: str
    number: int = 1
    signum: int = signal.SIGKILL
    after: bool = False
    rank: int = 0
    alone: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """`statuses` by rank: the exit status, or minus the signal that killed it. `output`: all ranks' stdout and stderr.

    The times are those of one clock: when the ranks started, when the strike came (None: it did not), when the last one ended.
    """

    statuses: list[int]
    output: str
    started: float
    struck: float | None
    ended: float

    @property
    def status(self) -> int:
        """Rank 0's."""
        return self.statuses[0]


def unranked() -> dict[str, str]:
    """This environment without what says that this process, which trains too, is a rank."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ours}


class Forks:
    """The client of a server process. It ends when its last client closes; those with the same `shared` folder have one."""

    def __init__(self, shared: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.server: subprocess.Popen | None = None  # if this client started it
        self.folder = folder = shared or Path(self._folder.name)
        with open(folder / "forks.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._stream = connected(folder / "forks")
            except OSError:  # there was none yet, or it has ended
                self.server = start(folder)
                self._stream = connected(folder / "forks")

    def run(self, raw: dict[str, Any] | list[dict[str, Any]] | str, *arguments: str, ranks: int = 1, strike: Strike | None = None,
            file_limit: int | None = None, timeout: float = 120, module: str = "seppo_fast.train",
            nodes: Sequence[int] = ()) -> Result:
        """Train on a configuration, by the `main` of `module`; `file_limit` is the largest file, in bytes, that it may write.

        `raw` is the configuration, or a file's name; `run_jobs` takes a list. `nodes`: for each rank the process whose namespaces
        are its machine (two_nodes.py).
        """
        job = {"arguments": ["--config", self._config(raw), *arguments], "ranks": ranks, "file_limit": file_limit,
               "timeout": timeout, "module": module, "strike": strike and asdict(strike), "delay": 0.0, "nodes": [*nodes]}
        return self._ask([job])[0]

    def run_both(self, one: dict[str, Any], other: dict[str, Any], *arguments: str, ranks: int = 1, apart: float = 0.0,
                 timeout: float = 120) -> list[Result]:
        """Train on two configurations at once, the other one started `apart` seconds after the first."""
        job = {"ranks": ranks, "file_limit": None, "timeout": timeout, "module": "seppo_fast.train", "strike": None, "nodes": []}
        return self._ask([job | {"arguments": ["--config", self._config(raw, number), *arguments], "delay": number * apart}
                          for number, raw in enumerate((one, other))])

    def _config(self, raw: dict[str, Any] | list[dict[str, Any]] | str, number: int = 0) -> str:
        if isinstance(raw, str):
            return raw
        file = Path(self._folder.name) / f"config{number}.json"
        file.write_text(json.dumps(raw))
        return str(file)

    def _ask(self, jobs: list[dict[str, Any]]) -> list[Result]:
        self._stream.write(json.dumps(jobs) + "\n")
        self._stream.flush()
        return [Result(**result) for result in json.loads(self._stream.readline())]

    def close(self) -> None:
        """Leave the server."""
        self._stream.close()

    def wait(self) -> None:
        """Until the server's last client has left, if this one started it."""
        if self.server is not None:
            self.server.wait()
        self._folder.cleanup()


def start(folder: Path) -> subprocess.Popen:
    """A server whose clients connect to `folder/forks`. They can at once, and wait until it has imported everything."""
    path = folder / "forks"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        return subprocess.Popen([sys.executable, __file__, str(listener.fileno()), str(folder)], cwd=ROOT,
                                stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()], env=unranked() | {"OMP_NUM_THREADS": "1"})


def connected(path: Path) -> TextIO:
    """Lines to and from a process of its own that the server forked for this client; an OSError where there is no server."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        stream = connection.makefile("rw")
    if stream.readline() != READY:
        raise ConnectionResetError(f"the server of {path} ended")
    return stream


def serve(listener: socket.socket, folder: Path) -> None:
    """Fork a process for each client, until none is left."""
    sys.path[0], here = str(ROOT), sys.path[0]
    sys.path.append(here)
    import deepspeed.ops
    import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (takes PyTorch's compiler with it: seconds in each rank)
    import estimates

    import seppo_fast.planning.dry_run  # noqa: F401
    import seppo_fast.train  # noqa: F401

    kept = folder / "estimates"
    kept.mkdir(exist_ok=True)
    estimates.remember(kept)
    assert deepspeed.ops.__compatible_ops__  # else every rank tries the compiler out
    gc.collect()
    gc.freeze()  # what the ranks share need not be searched by every collection of theirs, nor copied for it
    clients: dict[int, int] = {}  # the process that serves it, by a descriptor that is ready when that ends
    while True:
        for ready in select.select([listener, *clients], [], [])[0]:
            if ready is listener:
                child = serve_client(listener)
                clients[os.pidfd_open(child)] = child
            else:
                os.waitpid(clients.pop(ready), 0)
                os.close(ready)
        if not clients:
            return


def serve_client(listener: socket.socket) -> int:
    """The process that answers the next client: a JSON list of jobs a line, and the list of their results a line."""
    connection, _ = listener.accept()
    with connection:
        if child := os.fork():
            return child
        listener.close()
        stream = connection.makefile("rw")
    stream.write(READY)
    stream.flush()
    for line in stream:
        stream.write(json.dumps(run_jobs(json.loads(line))) + "\n")
        stream.flush()
    os._exit(0)


def run_jobs(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fork all jobs' ranks, wait for them, gather what they wrote."""
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in jobs]
        strikes = [stack.enter_context(mmap.mmap(-1, 8)) for _ in jobs]  # shared with the ranks: when the strike came
        start = time.monotonic()
        groups = [fork_ranks(job, output.fileno(), struck) for job, output, struck in zip(jobs, outputs, strikes, strict=True)]
        ends = wait(groups, max(job["timeout"] for job in jobs))
        results = []
        for job, group, output, struck in zip(jobs, groups, outputs, strikes, strict=True):
            output.seek(0)
            results.append({"statuses": [ends[child][0] for child in group], "output": output.read().decode(errors="replace"),
                            "started": start + job["delay"], "struck": struct.unpack("d", struck[:])[0] or None,
                            "ended": max(ends[child][1] for child in group)})
        return results


def fork_ranks(job: dict[str, Any], output: int, struck: mmap.mmap) -> list[int]:
    """The process ids of a job's ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children: list[int] = []
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            os.setpgid(0, children[0] if children else 0)
            be_rank(rank, port, output, job, struck)
        os.setpgid(child, children[0] if children else child)
        children.append(child)
    return children


def wait(groups: list[list[int]], timeout: float) -> dict[int, tuple[int, float]]:
    """By process: exit status, and when it ended; who is still there at the end of `timeout` seconds is killed (status -9)."""
    ends: dict[int, tuple[int, float]] = {}
    end = time.monotonic() + timeout
    watched = {os.pidfd_open(child): child for group in groups for child in group}
    while watched:
        ready, _, _ = select.select(list(watched), [], [], max(0.0, end - time.monotonic()))
        if not ready:
            for group in groups:
                if any(child not in ends for child in group):
                    os.killpg(group[0], signal.SIGKILL)
            end = time.monotonic() + 10
        for descriptor in ready:
            child = watched.pop(descriptor)
            os.close(descriptor)
            ends[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic()
    return ends


def be_rank(rank: int, port: int, output: int, job: dict[str, Any], struck: mmap.mmap) -> None:
    """In the forked process: become a rank and never return."""
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_SIZE=str(job["ranks"]),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if job["nodes"]:
            enter(job["nodes"][rank])
            os.environ.update(LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="node-a")
        faulthandler.dump_traceback_later(job["timeout"] - 2)  # where it hangs, if it does
        time.sleep(job["delay"])
        sys.argv = ["seppo_fast/train.py", f"--local_rank={rank}", *job["arguments"]]
        if job["file_limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
        if job["strike"] and job["strike"]["rank"] == rank:
            arm(Strike(**job["strike"]), struck)
        status = importlib.import_module(job["module"]).main()
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def enter(process: int) -> None:
    """Be on the machine that the process's namespaces are."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("net", "uts", "mnt"):
        with open(f"/proc/{process}/ns/{kind}") as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"the {kind} namespace of process {process}")
    os.chdir(ROOT)


def arm(strike: Strike, struck: mmap.mmap) -> None:
    """Put the signal in the way of the function."""
    def fire() -> None:
        struck[:] = struct.pack("d", time.monotonic())
        if strike.signum == signal.SIGKILL and not strike.alone:
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), strike.signum)

    def reached() -> None:
        if not strike.seconds:
            return fire()
        timer = threading.Timer(strike.seconds, fire)
        timer.daemon = True
        timer.start()

    if not strike.function:
        return reached()
    module, _, path = strike.function.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == strike.number and not strike.after:
            reached()
        result = original(*args, **kwargs)
        if calls == strike.number and strike.after:
            reached()
        return result

    setattr(owner, name, called)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
