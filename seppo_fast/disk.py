"""Getting files onto the disk before another file says that they are there."""

import errno
import os
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what an OSError's errno says of a full disk, a quota, a file limit


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
