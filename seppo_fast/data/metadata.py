"""Metadata files (metadata.jsonl, .csv) that name files: read in parts, each of which starts anywhere in its file."""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from seppo_fast.data.rows import BadRow, printable
from seppo_fast.errors import UserError

NAMES = ("metadata.jsonl", "metadata.csv")
ROWS_PER_PART = 256
STAT_THREADS = 16  # on network file systems a stat is a round trip


@dataclass(frozen=True)
class Span:
    """`count` records of a metadata file, the first of them at byte `offset`, which is line `line` (from 1)."""

    file: Path
    offset: int
    line: int
    count: int


@dataclass(frozen=True)
class Layout:
    """How records read. `locate(metadata file, record)` is the file that a record names; `headers`: the CSVs' first lines."""

    root: Path
    caption: str
    headers: dict[Path, list[str]]
    locate: Callable[[Path, dict], Path]


def metadata_files(folder: Path, split: str, what: str = "image") -> list[Path]:
    """The metadata files, sorted; those of the split's sub-folder when the folder itself has none."""
    if any((folder / name).is_file() for name in NAMES):
        root = folder
    else:
        root = folder / split if (folder / split).is_dir() else folder
    files = []
    for place, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        here = [name for name in NAMES if name in names]
        if len(here) > 1:
            raise UserError(f"{place} has both metadata.jsonl and metadata.csv; keep one of them")
        files += [Path(place) / name for name in here]
    if not files:
        raise UserError(f"no metadata.jsonl or metadata.csv in {root}; it needs one, with a row per {what}: file_name"
                        " and text")
    return files


def csv_header(file: Path) -> list[str]:
    """The names in a CSV's first line."""
    with open(file, encoding="utf-8-sig", newline="", errors="surrogateescape") as stream:
        return next(csv.reader(stream), [])


def records(span: Span, header: list[str] | None) -> Iterator[tuple[int, int, Any]]:
    """(byte offset, line, record) from the span's offset to the file's end; a record is a dict or a `BadRow`."""
    with open(span.file, "rb") as stream:
        stream.seek(span.offset)
        place = [span.offset, span.line]

        def lines() -> Iterator[str]:
            for raw in stream:
                place[0] += len(raw)
                place[1] += 1
                # File names may be any bytes; captions are checked later.
                yield raw.decode("utf-8-sig" if place[0] == len(raw) else "utf-8", "surrogateescape")

        source = lines()
        parsed = csv_records(source, header, span.file, place) if header is not None else map(json_record, source)
        while True:
            start = tuple(place)
            try:
                record = next(parsed)
            except StopIteration:
                return
            if record is not None:
                yield *start, record


def json_record(line: str) -> dict | BadRow | None:
    """One line of JSON; None when it is blank."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except ValueError as error:
        return BadRow(f"not valid JSON: {error}")
    return record if isinstance(record, dict) else BadRow(f"a JSON object was expected, got {type(record).__name__}")


def csv_records(lines: Iterator[str], header: list[str], file: Path, place: list[int]) -> Iterator[dict | None]:
    """Records of a CSV whose header is known. The reader takes no line before it needs it, so offsets stay exact."""
    reader = csv.reader(lines, strict=True)  # without it, a quote left open swallows the rest of the file
    if place[0] == 0:
        next(reader, None)
        yield None
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{file}, line {place[1] - 1}: {error}; look at the quotes there and above") from error
        yield dict(zip(header, values, strict=False)) if values else None


def scan(file: Path, header: list[str] | None) -> Iterator[tuple[Span, list[str]]]:
    """One pass over a metadata file: its parts, and the columns seen in each. Memory does not grow with the file."""
    every = records(Span(file, 0, 1, 0), header)
    while chunk := list(islice(every, ROWS_PER_PART)):
        offset, line, _ = chunk[0]
        names = {name: None for _, _, record in chunk if isinstance(record, dict) for name in record}
        yield Span(file, offset, line, len(chunk)), list(header or names)


def scan_all(files: list[Path], headers: dict[Path, list[str]]) -> tuple[list[Span], list[str]]:
    """The parts of all files in turn, and every column that is seen."""
    spans, columns = [], {}
    for file in files:
        for span, names in scan(file, headers.get(file)):
            spans.append(span)
            columns.update(dict.fromkeys(names))
    return spans, list(columns)


def named(span: Span, layout: Layout) -> Iterator[tuple[str, dict, Path | BadRow]]:
    """(key, record, the named file or why there is none) of each row of a part; the key is the metadata file and its line."""
    relative = span.file.relative_to(layout.root)
    for _, line, record in islice(records(span, layout.headers.get(span.file)), span.count):
        key = printable(f"{relative}:{line}")
        if isinstance(record, BadRow):
            yield key, {}, record
            continue
        try:
            yield key, record, layout.locate(span.file, record)
        except BadRow as bad:
            yield key, record, bad


def identity(spans: list[Span], layout: Layout) -> str:
    """A digest of the metadata files' content and of every named file's size and time of change."""
    def digest(span: Span) -> bytes:
        seen = hashlib.sha256()
        for key, record, file in named(span, layout):
            stamp = stamp_of(file) if isinstance(file, Path) else "unusable"
            seen.update(json.dumps([key, record, stamp], sort_keys=True, default=str).encode())
        return seen.digest()

    whole = hashlib.sha256()
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        for part in pool.map(digest, spans):
            whole.update(part)
    return whole.hexdigest()


def stamp_of(file: Path) -> list[int] | str:
    """Size and time of change (ns), or "missing"."""
    try:
        status = os.stat(file)
    except OSError:
        return "missing"
    return [status.st_size, status.st_mtime_ns]
