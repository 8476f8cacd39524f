"""Why a command failed, printed once: when one rank dies, the others fail with broken connections."""

import errno
import fcntl
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from seppo_fast.disk import NO_ROOM
from seppo_fast.lock import close, flocked, remove, started
from seppo_fast.opening import in_words

PREFIX = f"seppo-fast-{os.getuid()}-"
LATE = 10  # the ranks of one launch on a machine start within so many seconds


class FirstFailure:
    """Lets one process of a launch print on each machine. Create it as early as possible, and close it at the end.

    A file in the temporary folder has a line for each rank that came, and one for each that failed. All ranks hold a shared lock on
    it. A process that gets the lock alone is the first of a new launch, or the last to leave; the last one removes the file.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return
        try:
            folder = Path(tempfile.gettempdir())
            _clear(folder)
            self._path = folder / f"{PREFIX}{_launch()}"
            self._descriptor = self._enter()
        except OSError:  # no such folder, or another user's file: printing twice is better than never
            self._descriptor = None

    def say(self, words: str) -> None:
        """Print `words` on stderr, unless another rank failed first."""
        if self._is_first():
            print(words, file=sys.stderr, flush=True)

    def lost(self, then: str) -> Callable[[str], None]:
        """The last words of a process that ends because another one is gone, and what to do `then`; it leaves with them."""
        def say(words: str) -> None:
            self.say(f"seppo_fast: {words}; {then}")
            self.close()

        return say

    def close(self) -> None:
        """Leave; the last one removes the file, once all ranks have come."""
        if self._descriptor is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            last = self._all_came()
        except OSError:
            last = False
        remove(self._path, self._descriptor) if last else close(self._descriptor)
        self._descriptor = None

    def _enter(self) -> int:
        try:
            descriptor = flocked(self._path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._descriptor = descriptor
            if self._all_came() or _age(descriptor) > LATE:
                os.ftruncate(descriptor, 0)  # left by an earlier launch that was killed
        except BlockingIOError:
            descriptor = flocked(self._path, fcntl.LOCK_SH)
        os.write(descriptor, f"came {time.monotonic()}\n".encode())  # first: a process removes a file that is empty and unlocked
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def _is_first(self) -> bool:
        if self._descriptor is None:
            return True
        mine = f"failed {os.getpid()}"
        with suppress(OSError):  # a full disk
            os.write(self._descriptor, f"{mine}\n".encode())  # appended as a whole, so that all read the same order
        return next((line for line in _lines(self._descriptor) if line.startswith("failed")), mine) == mine

    def _all_came(self) -> bool:
        local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"]
        return str(sum(line.startswith("came") for line in _lines(self._descriptor))) == local


def _lines(descriptor: int) -> list[str]:
    return os.pread(descriptor, 1 << 20, 0).decode(errors="replace").splitlines()


def _age(descriptor: int) -> float:
    """Seconds since the last rank came, by a clock that nobody sets; infinite where none came since the machine started."""
    came = [line.removeprefix("came ") for line in _lines(descriptor) if line.startswith("came ")]
    try:
        age = time.monotonic() - float(came[-1])
    except (IndexError, ValueError):
        return math.inf
    return age if age >= 0 else math.inf


def _launch() -> str:
    """What the ranks of one launch on a machine have in common."""
    parent = started(os.getppid()) or psutil.boot_time()  # process ids are used again; a container's first process has no parent
    names = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    environment = [os.environ.get(name, "") for name in names]
    return "-".join(map(str, (os.getppid(), parent, *environment))).replace("/", "_")[:200]


def _clear(folder: Path) -> None:
    """Remove the files of launches that were killed, or whose ranks had no common parent."""
    for left in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):
            descriptor = flocked(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(left, descriptor) if _age(descriptor) > LATE else close(descriptor)


def explained(error: Exception, then: str = "start again") -> str:
    """Why the command failed, and what to do `then`; a traceback for errors that are not known here."""
    rank = os.environ.get("RANK", 0)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f"no room left on the disk ({error}); free some; {then}"
    if words := in_words(error):
        return f"{words} Then {then}"
    if no_threads(error):
        return (f"rank {rank} could not start a thread or process ({error}): there are too many (ulimit -u, or a container's limit"
                f" on processes). Raise the limit, or lower seppo.data.workers and OMP_NUM_THREADS; {then}")
    if lost_contact(error):
        return (f"rank {rank} lost another rank, which was killed (out of memory?) or stopped on another machine,"
                f" where the cause is printed: {str(error).split('. ')[0]}; {then}")
    return f"rank {rank} failed\n{traceback.format_exc()}"


def no_threads(error: Exception) -> bool:
    """Whether an error says that the system cannot start more threads or processes."""
    words = ("can't start new thread", os.strerror(errno.EAGAIN))  # Python's, and the system's own
    return isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in words)


def lost_contact(error: Exception) -> bool:
    """Whether an error says no more than that another rank is gone."""
    from torch import distributed as dist

    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Connection timed out",
             "No route to host")
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and any(word in str(error) for word in words)
