"""Getting files onto the disk before another file says that they are there."""

import os
from pathlib import Path


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
