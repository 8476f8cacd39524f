"""The marker of a complete checkpoint, `complete.json`: every file with its size and checksum, written last.

    {"format": 2, "files": {"state.json": {"size": 2711, "xxh3_128": "0f3c..."}, ...}}

Markers of the first format are `{"state.json": 2711, ...}`: only the sizes of their files are checked.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from seppo_fast.checksums import checksum

MARKER = "complete.json"


class Written(BaseModel):
    """A file as it was written; `xxh3_128` is None where the marker is of the first format."""

    model_config = ConfigDict(strict=True, frozen=True)

    size: int = Field(ge=0)
    xxh3_128: str | None = None


def _inside(name: str) -> str:
    if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError("not a file of this folder")
    return name


Files = Annotated[dict[Annotated[str, AfterValidator(_inside)], Written], Field(min_length=1)]


class _Marker(BaseModel):
    model_config = ConfigDict(strict=True)

    format: Literal[2]
    files: Files


_FIRST = TypeAdapter(Annotated[dict[Annotated[str, AfterValidator(_inside)], Annotated[int, Field(strict=True, ge=0)]],
                               Field(min_length=1)])


def declare(folder: Path, known: Mapping[str, Written]) -> None:
    """Write the marker. `known` are the files whose checksums were computed while writing; the others are read back."""
    files = {}
    (folder / MARKER).unlink(missing_ok=True)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name, size = file.relative_to(folder).as_posix(), file.stat().st_size
        files[name] = known.get(name) or Written(size=size, xxh3_128=checksum(file))
        if files[name].size != size:
            raise OSError(f"{file} has {size} bytes, and {files[name].size} were written")
    (folder / MARKER).write_text(_Marker(format=2, files=files).model_dump_json(indent=1), encoding="utf-8")


def listed(folder: Path) -> dict[str, Written]:
    """The files that the marker lists, by name; `ValueError` says what is wrong with it."""
    marker = folder / MARKER
    if not marker.is_file():
        raise ValueError(f"it has no {MARKER}")
    try:
        content = marker.read_bytes()
    except OSError as error:
        raise ValueError(f"its {MARKER} cannot be read ({error.strerror})") from None
    try:
        return _Marker.model_validate_json(content).files
    except ValidationError as error:
        problem = first_problem(error)
    try:
        sizes = _FIRST.validate_json(content)
    except ValidationError:
        sizes = {"format": 0}
    if "format" in sizes:
        raise ValueError(f"its {MARKER} cannot be read ({problem})")
    return {name: Written(size=size) for name, size in sizes.items()}


def first_problem(error: ValidationError) -> str:
    """The first problem of a JSON file: its key, and what is wrong."""
    what = error.errors()[0]
    return ".".join(map(str, what["loc"])) + ": " * bool(what["loc"]) + what["msg"]


def missing(folder: Path) -> str | None:
    """What a checkpoint lacks, by names and sizes, or None when it is complete."""
    try:
        files = listed(folder)
        for name, written in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != written.size:
                return f"{name} has {file.stat().st_size} bytes, not {written.size}"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    return None


def damaged(folder: Path, rank: int = 0, world: int = 1) -> str | None:
    """Which file of this rank's share is not as it was written, or None; the shares are about equal.

    One core computes checksums at 5 GB a second or more, so this takes as long as reading the disk; loading then reads from memory.
    """
    try:
        files = listed(folder)
    except (OSError, ValueError) as error:
        return str(error)
    for name in sorted(files, key=lambda name: (-files[name].size, name))[rank::world]:
        if lack := differs(folder, name, files[name]):
            return lack
    return None


def differs(folder: Path, name: str, written: Written) -> str | None:
    """How a file differs from what was written, or None."""
    try:
        if written.xxh3_128 is not None and checksum(folder / name) != written.xxh3_128:
            return f"{name} is damaged: its checksum is not the one of what was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None
