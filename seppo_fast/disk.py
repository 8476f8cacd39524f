"""Getting files onto the disk before another file says that they are there."""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from seppo_fast.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what an OSError's errno says of a full disk, a quota, a file limit
TEMPORARY = ".tmp-"  # how the name of a file begins that is not complete yet


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
    """A name beside `target` to write under; the file takes `target`'s place, on the disk, when the block ends well."""
    temporary = target.with_name(TEMPORARY + target.name)  # the suffix stays, by which some writers know the format
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
        probe = file.with_name(TEMPORARY + file.name)  # reading the umask would change it for other threads meanwhile
        probe.touch()
        usual = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        if stat.S_IMODE(file.stat().st_mode) != usual:
            file.chmod(usual)


@contextmanager
def explained(path: Path, advice: str) -> Iterator[None]:
    """An OSError over `path` becomes a `UserError` with this advice; a full disk stays one, for which each command has words."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise UserError(f"{path}: {error.strerror or error}; {advice}") from error
