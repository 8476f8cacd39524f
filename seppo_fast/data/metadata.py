"""Metadata files (metadata.jsonl, .csv) that name files. They are read in parts, each from its own offset in the file."""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from seppo_fast.data.files import open_data, walk
from seppo_fast.data.forms import LOOK_AT_QUOTES, header_of, why_no_json
from seppo_fast.data.rows import BadRow, Identity, ImageLike, looks_embedded, printable
from seppo_fast.data.splits import ALL, canonical, choose, split_named, split_of_folders
from seppo_fast.errors import UserError
from seppo_fast.strict import GivenTwice, parse_json, unlike_header

NAMES = ("metadata.jsonl", "metadata.csv")
ANY = ""  # of a row that names no file: it is bad in every split
ROWS_PER_PART = 256
LONGEST_LINE = 1 << 28  # bytes, some of them of images as text
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
    """How records are read. `locate(metadata file, record, key)`: the file (or image) that a record names; of a pair, both.

    `headers`: the names in the CSVs' first lines. `files` are the columns of which the first that is there names the file;
    `splits`: those that are wanted of what the names of folders tell.
    """

    root: Path
    caption: str
    headers: dict[Path, list[str] | None]
    locate: Callable[[Path, dict, str], Sequence[ImageLike]]
    files: Sequence[str]
    split: str
    splits: Collection[str | None]


@dataclass(frozen=True)
class Scanned:
    """The parts of metadata files, each with how many of its rows are of the split, and every column that was seen."""

    spans: list[tuple[Span, int]]
    columns: list[str]
    headers: dict[Path, list[str] | None]
    splits: Collection[str | None]


def metadata_files(folder: Path, what: str = "image") -> list[Path]:
    """All metadata files, sorted."""
    files = list(metadata_in(folder))
    if not files:
        raise UserError(f"no metadata.jsonl or metadata.csv in {folder}; it needs one, with a row per {what}: file_name"
                        " and text")
    return files


def metadata_in(folder: Path) -> Iterator[Path]:
    """The metadata files under a folder, from the top; folders are read only as far as the caller iterates."""
    for place, names in walk(folder):
        here = [name for name in NAMES if name in names]
        if len(here) > 1:
            raise UserError(f"{place} has both metadata.jsonl and metadata.csv; keep one of them")
        yield from (place / name for name in here)


def folder_split(file: Path, root: Path, split: str) -> str | None:
    """The split that a metadata file's folders name; the file `test.csv` is of the split test when that split is wanted."""
    told = split_of_folders(file.parent.relative_to(root).parts, split)
    own = None if file.name in NAMES else split_named(file.name, split)
    return told or (own if own == canonical(split) else None)


def row_split(file: Path, record: dict | BadRow, root: Path, names: Sequence[str], split: str) -> str | None:
    """The split of a row: by its metadata file's folders, else by the folders in the name it gives; ANY where it names no file.

    The files' own names do not count: `steam train.png` is no split.
    """
    told = folder_split(file, root, split)
    if told is not None:
        return told
    name = None if isinstance(record, BadRow) else next((record[column] for column in names if column in record), None)
    if not isinstance(name, str) or not name.strip() or looks_embedded(name):
        return ANY
    return split_of_folders(PurePosixPath(name).parent.parts, split)


def records(span: Span, header: list[str] | None) -> Iterator[tuple[int, int, Any]]:
    """(byte offset, line, record) from the span's offset to the file's end; a record is a dict or a `BadRow`."""
    with open_data(span.file) as stream:
        stream.seek(span.offset)
        place = [span.offset, span.line]

        def lines() -> Iterator[str]:
            for raw in iter(partial(stream.readline, LONGEST_LINE), b""):
                if len(raw) == LONGEST_LINE:
                    raise UserError(f"{span.file}: line {place[1]} is longer than {LONGEST_LINE:,} bytes; is it text at all?")
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
        record = parse_json(line)
    except GivenTwice as error:
        return BadRow(str(error))
    except ValueError as error:
        return BadRow(f"not valid JSON: {error}{why_no_json(line, error)}")
    return record if isinstance(record, dict) else BadRow(f"a JSON object was expected, got {type(record).__name__}")


def csv_records(lines: Iterator[str], header: list[str], file: Path, place: list[int]) -> Iterator[dict | BadRow | None]:
    """Records of a CSV whose header is known. The reader takes no line before it needs it, so offsets stay exact."""
    reader = csv.reader(lines, strict=True)  # without it, a quote left open swallows the rest of the file
    at_header = place[0] == 0
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{file}, line {place[1] - 1}: {error}; {LOOK_AT_QUOTES}") from error
        if at_header:
            at_header = False
            yield None
        elif len(values) < 2 and not "".join(values).strip():
            yield None
        elif len(values) != len(header):
            yield BadRow(unlike_header(len(values), len(header)))
        else:
            yield {name: value for name, value in zip(header, values, strict=True) if name}


def scan(file: Path, header: list[str] | None) -> Iterator[tuple[Span, list[tuple[int, Any]]]]:
    """One pass over a metadata file: its parts, and the (line, record) in each. Memory does not grow with the file."""
    every = records(Span(file, 0, 1, 0), header)
    while chunk := list(islice(every, ROWS_PER_PART)):
        offset, line, _ = chunk[0]
        yield Span(file, offset, line, len(chunk)), [(line, record) for _, line, record in chunk]


def scan_all(files: Sequence[Path], root: Path, names: Sequence[str], split: str, where: str) -> Scanned:
    """What is in the files, of which `names` are the columns that name files.

    Files in other splits' folders are not read. `UserError` when the split is not there, or no row of any file can be read.
    """
    told = {file: folder_split(file, root, split) for file in files}
    mine = [file for file in files if split == ALL or told[file] in (None, canonical(split))]
    headers = {file: header_of(file) for file in mine}
    found, columns, bad, unnamed = [], {}, [], []
    for file, header in headers.items():
        for span, rows in scan(file, header):
            count: Counter[str | None] = Counter()
            for line, record in rows:
                count[row_split(file, record, root, names, split)] += 1
                if isinstance(record, BadRow):
                    bad = bad or [(file, line, record)]
                else:
                    columns.update(dict.fromkeys(record))
            found.append((span, count))
            if None in count and not unnamed:
                unnamed = [f"{file.relative_to(root)} from line {span.line} on"]
    if bad and not columns:
        file, line, reason = bad[0]
        rows = sum(span.count for span, _ in found)
        raise UserError(f"{file}: not one of {rows} rows can be read; line {line}: {reason}" if rows > 1 else
                        f"{file}: its only row, line {line}, cannot be read: {reason}")
    there = {name for name in told.values() if name is not None}.union(*(count for _, count in found)) - {ANY}
    chosen = choose(there, split, where, unnamed) | {ANY} if there else {ANY}
    spans = [(span, sum(rows for name, rows in count.items() if name in chosen)) for span, count in found]
    return Scanned([(span, rows) for span, rows in spans if rows], list(columns), headers, chosen)


def named(span: Span, layout: Layout) -> Iterator[tuple[str, dict, Sequence[ImageLike] | BadRow]]:
    """(key, record, the named files or why there are none) of a part's rows in the split; the key is metadata file and line."""
    relative = span.file.relative_to(layout.root)
    for _, line, record in islice(records(span, layout.headers.get(span.file)), span.count):
        if row_split(span.file, record, layout.root, layout.files, layout.split) not in layout.splits:
            continue
        key = printable(f"{relative}:{line}")
        if isinstance(record, BadRow):
            yield key, {}, record
            continue
        try:
            yield key, record, layout.locate(span.file, record, key)
        except BadRow as bad:
            yield key, record, bad


def identity(spans: Sequence[Span], layout: Layout) -> Identity:
    """The identity of the metadata files' content and of every named file."""
    def digest(span: Span) -> tuple[bytes, str]:
        seen, written = hashlib.sha256(), []
        for key, record, files in named(span, layout):
            times = [times_of(file) if isinstance(file, Path) else ("unusable", None)
                     for file in ([files] if isinstance(files, BadRow) else files)]
            seen.update(json.dumps([key, record, *(stamp for stamp, _ in times)], sort_keys=True, default=str).encode())
            written += [when for _, when in times]
        return seen.digest(), digest_of(written)

    whole = hashlib.sha256()
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        found = list(pool.map(digest, spans))
    for part, _ in found:
        whole.update(part)
    return Identity(whole.hexdigest(), tuple(written for _, written in found))


def times_of(file: Path) -> tuple[list[int] | str, int | None]:
    """The file's `stamp_of` and `written_at`."""
    try:
        status = os.stat(file)
    except OSError:
        return "missing", None
    return [status.st_size, status.st_mtime_ns], status.st_ctime_ns


def stamp_of(file: Path) -> list[int] | str:
    """Size and time of change (ns), or "missing"."""
    return times_of(file)[0]


def written_at(file: Path) -> int | None:
    """When the file changed last (ctime, ns), which no program can set; None for a missing file."""
    return times_of(file)[1]


def digest_of(seen: Any) -> str:
    """The digest of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()
