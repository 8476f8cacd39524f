"""Files of demonstrations: where they are, and that each is a regular file which can be read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from seppo_fast.errors import UserError
from seppo_fast.opening import open_regular


def open_data(file: Path) -> BinaryIO:
    """The opened file; `UserError` when it cannot be read, or is a named pipe or a device."""
    try:
        return open_regular(file)
    except OSError as error:
        raise cannot_read(error, file) from error


def check_readable(file: Path) -> None:
    """The check of `open_data` for a file that a library will open by its name."""
    open_data(file).close()


def cannot_read(error: OSError, file: object) -> UserError:
    """The message for a file or folder that cannot be read."""
    return UserError(f"cannot read {file}: {error.strerror or error}; restore it, or its permissions")


@contextmanager
def readable() -> Iterator[None]:
    """Turns an `OSError` that names a file into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise cannot_read(error, error.filename) from error


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) for this folder and all below it, sorted. Links are followed, unless they lead back up.

    `UserError` where a folder cannot be read: its files would be missing and nobody would know.
    """
    def stop(error: OSError) -> None:
        raise cannot_read(error, error.filename)

    for place, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        folders[:] = sorted(name for name in folders if not leads_back(place, name))
        yield Path(place), sorted(names)


def leads_back(place: str, name: str) -> bool:
    """Whether a folder is a link to a folder above it."""
    path = os.path.join(place, name)
    return os.path.islink(path) and Path(place).resolve().is_relative_to(Path(path).resolve())


def files_under(folder: Path, suffixes: str | tuple[str, ...]) -> list[Path]:
    """The files of these endings in a folder and its sub-folders, sorted, each of them readable."""
    files = sorted(place / name for place, names in walk(folder) for name in names if name.endswith(suffixes))
    for file in files:
        check_readable(file)
    return files
