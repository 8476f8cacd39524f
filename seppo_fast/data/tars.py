"""WebDataset tars: samples are neighbouring files of one name, an image and a .txt or .json caption."""

import glob
import json
import tarfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

import braceexpand

from seppo_fast import config
from seppo_fast.data.columns import CAPTIONS, pick, refuse_pairs
from seppo_fast.data.rows import BadRow, Part, Row, Skipped, Source, checked_caption, printable
from seppo_fast.data.tables import stamps
from seppo_fast.errors import UserError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "caption", "text")
LOOK_AT = 16  # samples that tell which files there are; the very first may be the one bad row
DAMAGE = (tarfile.TarError, EOFError, zlib.error, OSError)


def open_tars(source: str, data: config.Data, needs_loser: bool) -> Source:
    """A tar, a folder of tars, or a pattern ("shards/{00000..00099}.tar", "shards/*.tar"); a part is a tar."""
    refuse_pairs(f"the webdataset {source}", needs_loser, data.choose)
    files = tar_files(source)
    first: dict[str, bytes] = {}
    for _, sample in islice((pair for file in files for pair in samples(file)), LOOK_AT):
        first = sample | first
    if not first:
        raise UserError(f"{source} has no samples: the tars are empty")
    where = f"the beginning of {files[0]}"
    image = pick(data.image_column, IMAGES, list(first), "image", where)
    caption, key = caption_field(first, data.caption_column, where)
    root = files[0].parent
    same_folder = all(file.parent == root for file in files)

    def rows(file: Path) -> Iterator[Row | Skipped]:
        name = file.name if same_folder else str(file)
        for stem, sample in samples(file):
            label = printable(f"{name}:{stem}")
            try:
                # Tars often mix image types; an explicit choice means only that one.
                found = [image] if data.image_column else [suffix for suffix in IMAGES if suffix in sample]
                if not found or found[0] not in sample:
                    raise BadRow(f"no image; the sample has: {', '.join(sample)}")
                yield Row(label, caption_of(sample, caption, key), sample[found[0]])
            except BadRow as bad:
                yield Skipped(label, str(bad))

    parts = [Part(file.name, None, lambda file=file: rows(file)) for file in files]
    columns = {"image": data.image_column or "+".join(IMAGES), "caption": f"{caption}.{key}" if key else caption}
    return Source(source, "webdataset", columns, parts, lambda: stamps(files, root if same_folder else Path("/")))


def tar_files(source: str) -> list[Path]:
    """The tars that a path or pattern means, absolute; order as the pattern says, sorted for folders and globs."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path.absolute()]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise UserError(f"{source} has no .tar files")
        return [file.absolute() for file in files]
    files = []
    for name in braceexpand.braceexpand(str(path)):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not found or not Path(found[0]).is_file():
            raise UserError(f"seppo.data.source={source!r}: there is no {name}")
        files += [Path(each).absolute() for each in found]
    return files


def samples(file: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(name, {extension: content}) of each sample, streamed: neighbours with the same name up to the first dot."""
    stem, sample = "", {}
    try:
        with tarfile.open(file, "r|*") as archive:
            for member in archive:
                archive.members = []  # tarfile remembers every header otherwise
                path = PurePosixPath(member.name)
                name, _, extension = path.name.partition(".")
                if not member.isfile() or not name or not extension:
                    continue
                here = str(path.parent / name)
                if here != stem and sample:
                    yield stem, sample
                    sample = {}
                stem = here
                stream = archive.extractfile(member)
                sample[extension.lower()] = stream.read() if stream else b""
            end = archive.offset
        check_end(file, end)
    except DAMAGE as error:
        after = f" after sample {printable(stem)!r}" if stem else ""
        raise UserError(f"{file} is no tar, damaged, or cut off{after} ({error}); fetch it again or take it out of"
                        " seppo.data.source") from error
    if sample:
        yield stem, sample


def check_end(file: Path, offset: int) -> None:
    """tarfile takes a broken header within a tar for its end; the real end is a block of zeros, or the file's."""
    with open(file, "rb") as stream:
        if stream.read(2) == b"\x1f\x8b":  # gzip has a checksum of its own
            return
        stream.seek(offset)
        if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no file header at byte {offset}")


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
        raise BadRow(f"no caption: there is no .{extension}; the sample has: {', '.join(sample)}")
    if key is None:
        return checked_caption(sample[extension]).strip()
    return checked_caption(json_object(sample[extension]).get(key))


def json_object(content: bytes) -> dict:
    """The object in a .json, or none: the caption is then missing."""
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
