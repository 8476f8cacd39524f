"""Locks on files, for one process at a time. The kernel's `flock` ends with its process."""

import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without flock answer
_held: set[int] = set()


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, as its file says; `started` tells it from a later process with the same number.

    `numbering` is the PID namespace in which the number counts: containers may share a machine's name, but not its processes.
    """

    host: str
    pid: int
    started: str
    since: str
    numbering: str = ""  # empty where the system does not say, or an earlier version wrote the file

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_gone(self) -> bool:
        """Whether the process has ended, as far as this machine can tell."""
        return self.is_here and started(self.pid) != self.started

    @property
    def is_here(self) -> bool:
        """Whether the process is, or was, one of those that this process can see."""
        return self.host == socket.gethostname() and self.numbering in ("", numbering())


def numbering() -> str:
    """What tells this process's PID namespace from others of the machine; empty where the system does not say."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def started(pid: int) -> str | None:
    """When a process started, which tells it from a later one with the same number; None where there is no such process.

    On Linux this counts from the boot, because the time of day may be set.
    """
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    with suppress(psutil.Error):
        return str(round(psutil.Process(pid).create_time()))
    return None


class Busy(Exception):
    """Another process holds the lock; `owner` is None where its file does not say which.

    `unproven`: only the file says that it lives, which cannot be checked from here.
    """

    def __init__(self, path: Path, owner: Owner | None, unproven: bool = False) -> None:
        super().__init__(str(owner) if owner else f"a process that {path} does not name")
        self.owner = owner
        self.unproven = unproven


@contextmanager
def locked(path: Path, without_flock: bool = True) -> Iterator[None]:
    """Hold the lock `path` during the block; `Busy` when another process holds it.

    On a file system without flock, the file itself is the lock; it stays behind when another machine dies. With `without_flock`
    false, such a file system is an `OSError` with an errno of UNSUPPORTED.
    """
    try:
        descriptor = flocked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(path, _owner(path)) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED or not without_flock:
            raise
        with _linked(path):
            yield
        return
    try:
        with suppress(OSError):  # a full disk: the lock holds, but its file does not name us
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _myself())
        yield
    finally:
        remove(path, descriptor)


def flocked(path: Path, operation: int) -> int:
    """A descriptor of `path` with this flock on it; a missing file is created. Forked children do not keep the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, operation)
            if _is_at(path, descriptor):  # its holder may have removed it in between
                _held.add(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def remove(path: Path, descriptor: int) -> None:
    """Release the lock and remove its file, unless the path is another file by now."""
    if _is_at(path, descriptor):
        path.unlink(missing_ok=True)
    close(descriptor)


def close(descriptor: int) -> None:
    """Release the lock; the file stays."""
    _held.discard(descriptor)
    os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _forget() -> None:
    """Close a forked child's copies of the descriptors, which would keep the locks after their owner's death."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)


def _myself() -> bytes:
    since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    owner = Owner(socket.gethostname(), os.getpid(), started(os.getpid()) or "", since, numbering())
    return (json.dumps(asdict(owner)) + "\n").encode()


def _owner(path: Path) -> Owner | None:
    """The holder that the file names; the file is empty for a moment after it was created."""
    for _ in range(10):
        try:
            return Owner(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            time.sleep(0.02)
    return None


@contextmanager
def _linked(path: Path) -> Iterator[None]:
    """The lock where there is no flock: the file's creator holds it. A file of a dead process of this machine is removed first."""
    temporary, myself = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp"), _myself()
    temporary.write_bytes(myself)
    try:
        while True:
            try:
                os.link(temporary, path)
                break
            except FileExistsError:
                owner = _owner(path)
                if owner is not None and not owner.is_gone():  # it appears with its content, so an empty file is nobody's lock
                    raise Busy(path, owner, unproven=not owner.is_here) from None
                _take_away(path, owner)
    finally:
        temporary.unlink()
    try:
        yield
    finally:
        if path.exists() and path.read_bytes() == myself:
            path.unlink()


def _take_away(path: Path, gone: Owner | None) -> None:
    """Remove the lock of a process that is gone, but not that of another process that did the same a moment earlier."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _owner(aside) != gone:
        os.link(aside, path)
    aside.unlink()
