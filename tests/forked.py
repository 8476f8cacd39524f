"""The command without its start-up time: a process that has imported everything, and forks the ranks of each run.

`Forks().run(raw, ...)` calls train.py's `main()` in fresh processes with the environment that DeepSpeed's launcher makes, a
process group a run. `strike` makes rank `rank` send a signal at an exact place: at the `number`-th call of `function`, before
or after it. SIGKILL goes to the whole group, as when a machine goes down; anything else to that rank alone.
"""

import faulthandler
import functools
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Strike:
    """A signal at an exact place; `function` as "package.module:Class.method". `alone`: SIGKILL to this rank only."""

    function: str
    number: int = 1
    signum: int = signal.SIGKILL
    after: bool = False
    rank: int = 0
    alone: bool = False


@dataclass(frozen=True)
class Result:
    """`statuses` by rank: the exit status, or minus the signal that killed it. `output`: all ranks' stdout and stderr."""

    statuses: list[int]
    output: str

    @property
    def status(self) -> int:
        """Rank 0's."""
        return self.statuses[0]


class Forks:
    """The client: one server process until `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        estimates = Path(self._folder.name) / "estimates"
        estimates.mkdir()
        self._server = subprocess.Popen([sys.executable, __file__, str(estimates)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def run(self, raw: dict[str, Any] | list[dict[str, Any]] | str, *arguments: str, ranks: int = 1, strike: Strike | None = None,
            file_limit: int | None = None, timeout: float = 120, module: str = "seppo_fast.train") -> Result:
        """Train on a configuration, by the `main` of `module`; `file_limit` is the largest file, in bytes, that it may write.

        `raw` is the configuration, or a shipped file's name; `run_jobs` takes a list.
        """
        config = raw if isinstance(raw, str) else f"{self._folder.name}/config.json"
        if config is not raw:
            Path(config).write_text(json.dumps(raw))
        job = {"arguments": ["--config", config, *arguments], "ranks": ranks, "file_limit": file_limit, "timeout": timeout,
               "module": module, "strike": strike and asdict(strike)}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Result(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        """End the server."""
        self._server.stdin.close()
        self._server.wait()
        self._folder.cleanup()


def serve() -> None:
    """One JSON job a line on stdin, one JSON result a line on stdout."""
    sys.path[0], here = str(ROOT), sys.path[0]
    sys.path.append(here)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import deepspeed.ops
    import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (takes PyTorch's compiler with it: seconds in each rank)
    import estimates

    import seppo_fast.train  # noqa: F401
    import seppo_fast.training.dry_run  # noqa: F401

    estimates.remember(Path(sys.argv[1]))
    assert deepspeed.ops.__compatible_ops__  # else every rank tries the compiler out
    gc.collect()
    gc.freeze()  # what the ranks share need not be searched by every collection of theirs, nor copied for it
    for line in sys.stdin:
        answers.write(json.dumps(run_job(json.loads(line))) + "\n")
        answers.flush()


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks, wait for them, gather what they wrote."""
    with tempfile.TemporaryFile() as output, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        children: list[int] = []
        for rank in range(job["ranks"]):
            child = os.fork()
            if child == 0:
                os.setpgid(0, children[0] if children else 0)
                be_rank(rank, port, output.fileno(), job)
            os.setpgid(child, children[0] if children else child)
            children.append(child)
        statuses = wait(children, job["timeout"])
        output.seek(0)
        return {"statuses": statuses, "output": output.read().decode(errors="replace")}


def wait(children: list[int], timeout: float) -> list[int]:
    """Exit statuses; who is still there at the end of `timeout` seconds is killed (status -9)."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + timeout
    watched = {os.pidfd_open(child): child for child in children}
    while watched:
        ready, _, _ = select.select(list(watched), [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.killpg(children[0], signal.SIGKILL)
            end = time.monotonic() + 10
        for descriptor in ready:
            child = watched.pop(descriptor)
            os.close(descriptor)
            statuses[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [statuses[child] for child in children]


def be_rank(rank: int, port: int, output: int, job: dict[str, Any]) -> None:
    """In the forked process: become a rank and never return."""
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]), LOCAL_SIZE=str(job["ranks"]),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        faulthandler.dump_traceback_later(job["timeout"] - 2)  # where it hangs, if it does
        sys.argv = ["seppo_fast/train.py", f"--local_rank={rank}", *job["arguments"]]
        if job["file_limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
        if job["strike"] and job["strike"]["rank"] == rank:
            arm(Strike(**job["strike"]))
        status = importlib.import_module(job["module"]).main()
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def arm(strike: Strike) -> None:
    """Put the signal in the way of the function."""
    module, _, path = strike.function.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)
    calls = 0

    def fire() -> None:
        if strike.signum == signal.SIGKILL and not strike.alone:
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), strike.signum)

    @functools.wraps(original)
    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == strike.number and not strike.after:
            fire()
        result = original(*args, **kwargs)
        if calls == strike.number and strike.after:
            fire()
        return result

    setattr(owner, name, struck)


if __name__ == "__main__":
    serve()
