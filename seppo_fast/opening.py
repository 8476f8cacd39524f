"""Opening the files of models, runs and configurations; a message names the file that is wrong and says what to do."""

import os
import pwd
import stat
from pathlib import Path
from typing import Any, BinaryIO

from seppo_fast.errors import UserError
from seppo_fast.strict import parse_json

KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
         stat.S_IFBLK: "a device"}
MOST_TEXT = 64 << 20  # bytes; the largest vocabularies are a quarter of it


class NotRegular(OSError):
    """A path is a folder, a named pipe or a device; reading one may never end."""


def expanded(path: str) -> Path:
    """The path with "~" replaced by the home folder, unless a file has exactly this name or the home is not known."""
    return Path(path if os.path.lexists(path) else os.path.expanduser(path))


def named_file(given: str, name: str, key: str, advice: str) -> Path:
    """The file that a key of the configuration gives, itself or by the folder in which it is called `name`."""
    path = expanded(given)
    file = path / name if path.is_dir() else path
    if not file.is_file():
        why = f"the folder has no {name}" if path.is_dir() else "there is no such file here"
        raise UserError(f"{key} {given}: {why}; {advice}")
    return file


def open_regular(path: Path) -> BinaryIO:
    """The opened file; `OSError` where it cannot be opened, `NotRegular` where it is not a regular file."""
    _check_regular(path, os.stat(path))  # before opening: some devices act when they are opened
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    try:
        _check_regular(path, os.fstat(stream.fileno()))
    except NotRegular:
        stream.close()
        raise
    return stream


def open_file(path: Path, advice: str = "") -> BinaryIO:
    """The opened file, or a `UserError` that says why it cannot be read; `advice` is what to do where it is missing."""
    try:
        return open_regular(path)
    except OSError as error:
        raise unreadable(path, error, advice) from error


def read_text(path: Path, advice: str = "") -> str:
    """The text of a UTF-8 file, with or without a byte order mark; a `UserError` otherwise."""
    with open_file(path, advice) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MOST_TEXT:
            raise UserError(f"{path} has {size} bytes, where a text of at most {MOST_TEXT} is expected: is it another file?")
        try:
            return stream.read(MOST_TEXT + 1).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no UTF-8 text (byte {error.start}).{advice and ' '}{advice}") from error
        except OSError as error:
            raise unreadable(path, error) from error


def read_object(path: Path, advice: str = "") -> dict[str, Any]:
    """The JSON object in a file; a `UserError` where there is none, or a key is given twice."""
    after = f" {advice}" if advice else ""
    try:
        value = parse_json(read_text(path, advice))
    except ValueError as error:  # not JSON, or a key given twice
        raise UserError(f"{path} is not valid JSON ({error}).{after}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object at the top level, got {type(value).__name__}.{after}")
    return value


def unreadable(path: Path, error: OSError, advice: str = "") -> UserError:
    """Why a file cannot be read, as a message; `advice` is what to do where it is missing."""
    after = f" {advice}" if advice else ""
    if isinstance(error, FileNotFoundError):
        target = f": it is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
        return UserError(f"{path} is missing{target}.{after}")
    if isinstance(error, PermissionError):
        return UserError(f"{path} cannot be read: {permission(path)}.")
    return UserError(f"{path} cannot be read: {error.strerror or error}.{after}")


def in_words(error: Exception) -> str | None:
    """A message for an error about a path, with what to do, wherever it was raised; None for any other error."""
    if not isinstance(error, PermissionError | NotRegular) or error.filename is None:
        return None
    path = Path(os.fsdecode(error.filename))
    if isinstance(error, NotRegular):
        return str(unreadable(path, error))
    return f"{path} cannot be read or written: {permission(path)}."


def permission(path: Path) -> str:
    """Which file or folder keeps this process from `path`, whose it is, and what its owner can do."""
    for place in [*reversed(path.absolute().parents), path]:
        try:
            status = os.stat(place)
            if os.access(place, os.R_OK if place == path else os.X_OK):
                continue
        except OSError:  # it does not exist, so it was going to be written
            break
        right = "r" if place == path and not stat.S_ISDIR(status.st_mode) else "rx"
        return f"permission denied: {_whose(place, status)}; its owner can `chmod a+{right}` it"
    place = path if os.path.exists(path) else path.absolute().parent
    if not os.path.exists(place):
        return "permission denied"
    return f"permission denied: {_whose(place, os.stat(place))}; to write there, ask its owner, or choose another place"


def _whose(place: Path, status: os.stat_result) -> str:
    return (f"{place} belongs to {user(status.st_uid)} and has mode {stat.S_IMODE(status.st_mode):04o}, and this runs as"
            f" {user(os.getuid())}")


def user(uid: int) -> str:
    """A user's name, or the number where it has none, as in containers."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise NotRegular(None, f"it is {kind}, and no regular file", str(path))
