"""WebDataset tars: samples are neighbouring files of one name, an image (KEY.jpg), a caption (.txt or .json), of pairs a loser
(KEY.loser.jpg or KEY.rejected.jpg).
"""

import bz2
import glob
import gzip
import lzma
import os
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

import braceexpand

from seppo_fast import config
from seppo_fast.data.columns import CAPTIONS, check_both, pick
from seppo_fast.data.files import check_readable, files_under, open_data
from seppo_fast.data.pairs import WORDS, Use, refuse_single
from seppo_fast.data.rows import BadRow, Part, Row, Skipped, Source, check_size, checked_caption, printable
from seppo_fast.data.splits import ALL, TRAIN, check_file, files_of_split, splits_of
from seppo_fast.data.tables import stamps
from seppo_fast.errors import UserError
from seppo_fast.opening import expanded
from seppo_fast.strict import GivenTwice, parse_json

SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGES = ("jpg", "jpeg", "png", "webp")
LOSERS = tuple(f"{loser}.{image}" for loser in WORDS.values() for image in IMAGES)
TEXTS = ("txt", "caption", "text")
LOOK_AT = 16  # samples that tell which files there are; the very first may be the one bad row
DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)
COMPRESSED: dict[bytes, Callable[..., BinaryIO]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
UNPACKED, TIMES = 1 << 28, 100  # bytes that a tar may unpack to, and how many times its size
NEIGHBOURS = "a sample's files must be neighbours in the tar (tar --sort=name), and its name must be its own"


def open_tars(source: str, data: config.Data, use: Use) -> Source:
    """A tar, a folder of tars, or a pattern ("shards/{00000..00099}.tar", "shards/*.tar"); a part is a tar."""
    files = tar_files(source, data.split)
    first: dict[str, bytes] = {}
    for _, sample in islice((pair for file in files for pair in samples(file)), LOOK_AT):
        if not isinstance(sample, BadRow) and is_clear(sample.get("json", b"{}")):
            first = sample | first
    if not first:
        raise UserError(f"{source} has no samples: the tars are empty")
    where = f"the beginning of {files[0]}"
    check_both(data, where)
    image = pick(data.image_column, IMAGES, list(first), "image", where)
    if data.loser_column is not None:
        pick(data.loser_column, (), list(first), "loser", where)
    elif not any(loser in first for loser in LOSERS):
        refuse_single(f"the webdataset {source}", use, "put the losers beside the winners as KEY.loser.jpg, or name their ending"
                      " with seppo.data.loser_column")
    caption, key = caption_field(first, data.caption_column, where)
    # Tars often mix image types; an explicit choice means only that one.
    images = [image] if data.image_column else IMAGES
    losers = [data.loser_column] if data.loser_column else LOSERS
    root = Path(os.path.commonpath([file.parent for file in files]))

    def rows(file: Path) -> Iterator[Row | Skipped]:
        name = str(file.relative_to(root))
        for stem, sample in samples(file):
            label = printable(f"{name}:{stem}")
            try:
                if isinstance(sample, BadRow):
                    raise sample
                taken = (only(sample, images, "image"),)
                if use.both:
                    taken = use.of(label, *taken, only(sample, losers, "loser"))
                yield Row(label, caption_of(sample, caption, key), *(sample[ending] for ending in taken))
            except BadRow as bad:
                yield Skipped(label, str(bad))

    parts = [Part(file.name, None, lambda file=file: rows(file)) for file in files]
    columns = {"image": data.image_column or "+".join(IMAGES), "caption": f"{caption}.{key}" if key else caption}
    if use.both:
        columns["loser"] = "+".join(losers)
    return Source(source, "webdataset", columns, parts, lambda: stamps(files, root, [[file] for file in files]))


def only(sample: dict[str, bytes], endings: Sequence[str], what: str) -> str:
    """The one ending of which the sample has a file; `BadRow` for none or several."""
    found = [ending for ending in endings if ending in sample]
    if not found:
        raise BadRow(f"no {what}; the sample has: {', '.join(sample)}; {NEIGHBOURS}")
    if len(found) > 1:
        raise BadRow(f"it has several {what}s ({', '.join(found)}); say which with seppo.data.{what}_column")
    return found[0]


def tar_files(source: str, split: str) -> list[Path]:
    """The tars that a path or pattern means, absolute; order as the pattern says, sorted for folders and globs.

    Of a pattern, only what follows the folders that are there by its letters is one.
    """
    path = expanded(source)
    if path.is_file():
        check_file(path, split)
        return [path.absolute()]
    if path.is_dir():
        files = files_under(path, SUFFIXES)
        if not files:
            raise UserError(f"{source} has no .tar files")
        return [file.absolute() for file in files_of_split(files, path, split)]
    files, folder = [], next(parent for parent in path.parents if parent.is_dir())
    for name in alternatives(str(path.relative_to(folder))):
        literal = not glob.has_magic(name) or (folder / name).exists()
        found = [(folder / each).absolute() for each in ([name] if literal else sorted(glob.glob(name, root_dir=folder)))]
        if not found or not found[0].exists():
            raise UserError(f"seppo.data.source={source!r}: there is no {folder / name}")
        for file in found:
            check_readable(file)
        files += matching(found, split)
    return files


def alternatives(pattern: str) -> Iterator[str]:
    """The names that a pattern with braces means."""
    try:
        yield from braceexpand.braceexpand(pattern)
    except braceexpand.UnbalancedBracesError:
        yield pattern


def matching(files: list[Path], split: str) -> list[Path]:
    """The files of the split among those that one pattern matches, where these are of several splits."""
    if len(files) == 1:
        check_file(files[0], split)
        return files
    root = Path(os.path.commonpath([file.parent for file in files]))
    named = set(splits_of([file.relative_to(root).as_posix() for file in files], split)) - {None}
    return files if len(named) < 2 and split in (TRAIN, ALL) else files_of_split(files, root, split)


def samples(file: Path) -> Iterator[tuple[str, dict[str, bytes] | BadRow]]:
    """(name, {extension: content}) of each sample, or why it is none, streamed: neighbours of one name up to the first dot."""
    stem, sample = "", {}
    seen: set[int] = set()  # hashes: a set of names would grow with their length
    try:
        with open_data(file) as raw, unpacked(raw) as stream:
            for name, extension, size, content in members(Blocks(file, raw, stream)):
                if name != stem:
                    if sample:
                        yield stem, sample
                    again = hash(name) in seen
                    stem, sample = name, BadRow(f"its name came before in this tar: {NEIGHBOURS}") if again else {}
                    seen.add(hash(name))
                if isinstance(sample, dict) and extension in sample:
                    sample = BadRow(f"it has two .{extension} files (of whatever case); which one is meant?")
                if isinstance(sample, dict):
                    try:
                        check_size(size)
                        sample[extension] = content.read() if content else b""
                    except BadRow as bad:
                        sample = BadRow(f"its .{extension} is {bad}")
    except DAMAGE as error:
        after = f" after sample {printable(stem)!r}" if stem else ""
        raise UserError(f"{file} is no tar, damaged, or cut off{after} ({error}); fetch it again or take it out of"
                        " seppo.data.source") from error
    if sample:
        yield stem, sample


def unpacked(raw: BinaryIO) -> BinaryIO:
    """A tar's content, by its first bytes: it may be compressed."""
    head = raw.peek(6)
    form = next((form for magic, form in COMPRESSED.items() if head.startswith(magic)), None)
    return form(raw, "rb") if form else raw


class Blocks:
    """A stream that remembers what was read last, and stops where a small file (`raw`) unpacks to one without end."""

    def __init__(self, file: Path, raw: BinaryIO, stream: BinaryIO) -> None:
        self.file, self.raw, self.stream, self.last, self.count = file, raw, stream, b"", 0

    def read(self, size: int) -> bytes:
        self.last = self.stream.read(size)
        self.count += len(self.last)
        if self.count > UNPACKED and self.count > TIMES * self.raw.tell():
            raise UserError(f"{self.file} unpacks to more than {TIMES} times its size, which images do not; take it out of"
                            " seppo.data.source, or unpack it (gunzip)")
        return self.last

    def peek(self, size: int) -> bytes:
        return self.stream.peek(size)


def members(blocks: Blocks) -> Iterator[tuple[str, str, int, IO[bytes] | None]]:
    """(path up to the first dot of its name, extension, size, content to read) of each file in a tar, or in several joined."""
    while True:
        # Block by block, so that nothing after the archive's end is read along with it.
        with tarfile.open(fileobj=blocks, mode="r|", bufsize=tarfile.BLOCKSIZE) as archive:
            for member in archive:
                archive.members = []  # tarfile remembers every header otherwise
                path = PurePosixPath(unicodedata.normalize("NFC", member.name))
                name, _, extension = path.name.partition(".")
                if member.isfile() and name and extension:
                    yield str(path.parent / name), extension.lower(), member.size, archive.extractfile(member)
            # tarfile takes a broken header for the end; the real end is a block of zeros, or the file's.
            if blocks.last.strip(b"\0"):
                raise tarfile.ReadError(f"no file header at byte {archive.offset}")
        while (head := blocks.peek(1)) and not head.strip(b"\0"):
            blocks.read(len(head))
        if not head:
            return
        blocks.read(len(head) - len(head.lstrip(b"\0")))  # `cat a.tar b.tar`


def caption_field(sample: dict[str, bytes], wanted: str | None, where: str) -> tuple[str, str | None]:
    """(extension, key in it): the caption is a text file, or a key of the .json."""
    inside = json_object(sample.get("json", b"{}"))
    if wanted is not None:
        if wanted in sample and wanted != "json":
            return wanted, None
        if wanted in inside:
            return "json", wanted
        raise UserError(f"seppo.data.caption_column={wanted!r}: {where} has no such file or json key; it has the files"
                        f" {', '.join(sample)}" + (f" and the json keys {', '.join(inside)}" if inside else ""))
    for extension in TEXTS:
        if extension in sample:
            return extension, None
    if "json" in sample:
        return "json", pick(None, CAPTIONS, list(inside), "caption", f"the json of {where}")
    raise UserError(f"{where} has no caption (a .txt, or a .json with text, caption or prompt); it has:"
                    f" {', '.join(sample)}")


def caption_of(sample: dict[str, bytes], extension: str, key: str | None) -> str:
    """The sample's caption; `BadRow` when it has none."""
    if extension not in sample:
        raise BadRow(f"no caption: there is no .{extension}; the sample has: {', '.join(sample)}; {NEIGHBOURS}")
    if key is None:
        return checked_caption(sample[extension]).strip()
    return checked_caption(json_object(sample[extension]).get(key))


def is_clear(content: bytes) -> bool:
    """Whether a .json has each key once."""
    try:
        json_object(content)
    except BadRow:
        return False
    return True


def json_object(content: bytes) -> dict:
    """The object in a .json, or none: the caption is then missing; `BadRow` when it has a key twice."""
    try:
        value = parse_json(content)
    except GivenTwice as error:
        raise BadRow(f"its .json: {error}") from None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
