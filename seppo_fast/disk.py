"""Writing files so that they are on the disk before another file refers to them."""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from seppo_fast.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # an OSError's errno for a full disk, a quota, a limit on file sizes
TEMPORARY = ".tmp-"  # the names of files that are not complete yet begin with it


def flush(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """fsync every file and folder below, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


@contextmanager
def complete_or_not(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` to write to. When the block ends well, the file is flushed and replaces `target`."""
    temporary = target.with_name(TEMPORARY + target.name)  # with the same suffix: some writers choose the format by it
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def follow_umask(files: Iterable[Path]) -> None:
    """Give files the permissions that a new one gets in their folder: safetensors makes its own with 0600."""
    for file in [*files]:
        probe = file.with_name(TEMPORARY + file.name)  # os.umask would change it for other threads for a moment
        probe.touch()
        usual = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        if stat.S_IMODE(file.stat().st_mode) != usual:
            file.chmod(usual)


@contextmanager
def explained(path: Path, advice: str) -> Iterator[None]:
    """Turn an OSError about `path` into a `UserError` with this advice. A full disk stays an OSError: each command explains it."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise UserError(f"{path}: {error.strerror or error}; {advice}") from error
