"""A folder of images with a text file of the same name beside each (kohya's layout: `picture.png`, `picture.txt`).

As kohya's scripts read them, the caption is the file's first line, in UTF-8, and the ending is .txt or .caption. Unlike there an
image without one is skipped rather than trained on without a caption, and a number in a folder's name does not repeat its images.

Where a folder of winners (`chosen`) has that of the losers (`rejected`) beside it, files of one name are a pair.
"""

import codecs
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from seppo_fast import config
from seppo_fast.data.files import walk
from seppo_fast.data.metadata import ROWS_PER_PART, STAT_THREADS, digest_of, times_of
from seppo_fast.data.pairs import BACK, FOLDERS, Use, beside, refuse_single
from seppo_fast.data.rows import BadRow, Identity, Part, Row, Skipped, Source, checked_caption, inside, printable, read_bytes
from seppo_fast.data.splits import choose, split_of_folders
from seppo_fast.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
TEXTS = (".txt", ".caption")
REMEDY = "put winners with their captions, and losers under the same names, into folders 'chosen' and 'rejected' beside one another"
LINE_END = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True)
class Captioned:
    """An image, the files that may hold its caption, and its loser where it is of a pair; or a loser (`alone`) without a winner."""

    image: Path
    texts: tuple[Path, ...]
    loser: Path | None = None
    alone: bool = False


def captioned_in(place: Path, names: Sequence[str]) -> list[Captioned]:
    """The images among a folder's files. Names may differ in the form of accents (a Mac's NFD) and in the case of endings."""
    seen = [name for name in names if not name.startswith(".")]  # "._a.png" is no picture, but what a Mac knows of one
    texts: dict[str, list[Path]] = {}
    for name in seen:
        if suffix(name) in TEXTS:
            texts.setdefault(stem(name), []).append(place / name)
    return [Captioned(place / name, tuple(texts.get(stem(name), ()))) for name in seen if suffix(name) in IMAGES]


def has_captions(place: Path, names: Sequence[str]) -> bool:
    """Whether an image among a folder's files has its caption beside it."""
    return any(suffix(name) in TEXTS for name in names) and any(found.texts for found in captioned_in(place, names))


def suffix(name: str) -> str:
    """A name's ending, in lower case."""
    return os.path.splitext(name)[1].lower()


def stem(name: str) -> str:
    """A name without its ending, with accents composed."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def open_captioned(folder: Path, data: config.Data, use: Use) -> Source:
    """All images under a folder that are of the split, in parts of 256."""
    if given := [key for key in ("image_column", "loser_column", "caption_column") if getattr(data, key) is not None]:
        raise UserError(f"seppo.data.{given[0]}: {folder} has a text file for each image, and no columns; leave the key out")
    found = [item for place, names in walk(folder) for item in with_losers(place, captioned_in(place, names), folder, use)]
    if not any(item.texts for item in found):
        raise UserError(f"{folder} has no image with a caption beside it (picture.png with picture.txt)")
    if not any(item.loser for item in found):
        refuse_single(f"the folder of captioned images {folder}", use, REMEDY)
    splits = [split_of_folders(item.image.parent.relative_to(folder).parts, data.split) for item in found]
    unnamed = [str(item.image.relative_to(folder)) for item, split in zip(found, splits, strict=True) if split is None]
    chosen = choose(splits, data.split, str(folder), unnamed)
    mine = [item for item, split in zip(found, splits, strict=True) if split in chosen]
    chunks = [mine[start : start + ROWS_PER_PART] for start in range(0, len(mine), ROWS_PER_PART)]
    parts = [Part(printable(str(chunk[0].image.relative_to(folder))), len(chunk), partial(rows, chunk, folder, use))
             for chunk in chunks]
    columns = {"image": "file", "caption": "text file"} | ({"loser": "folder"} if use.both else {})
    return Source(str(folder), "captions", columns, parts, lambda: identity(chunks, folder))


def with_losers(place: Path, found: Sequence[Captioned], root: Path, use: Use) -> list[Captioned]:
    """A folder's images, with their losers if the run wants them; of a folder of losers only those that have no winner."""
    if (winners := beside(place, root, BACK)) is not None:
        return [Captioned(item.image, (), alone=True) for item in found
                if use.both and not os.path.lexists(inside(winners, item.image.name))]
    losers = beside(place, root) if use.both else None
    return [replace(item, loser=inside(losers, item.image.name)) for item in found] if losers else list(found)


def rows(found: Sequence[Captioned], folder: Path, use: Use) -> Iterator[Row | Skipped]:
    """The rows of one part; the key is the image's name."""
    for item in found:
        key = printable(str(item.image.relative_to(folder)))
        try:
            images = images_of(item, key, use)
            yield Row(key, caption_of(item), *images)
        except BadRow as bad:
            yield Skipped(key, str(bad))


def images_of(item: Captioned, key: str, use: Use) -> tuple[Path, ...]:
    """The image, or what the run takes of the pair; `BadRow` where half of the pair is missing."""
    if item.alone:
        raise BadRow("no winner: no file of this name is in the folder of the winners")
    if not use.both:
        return (item.image,)
    if item.loser is None:
        raise BadRow(f"no loser: it is in no folder of winners ({', '.join(FOLDERS)}) with the losers' beside it")
    return use.of(key, item.image, item.loser)


def caption_of(item: Captioned) -> str:
    """The first line of an image's text file, or `BadRow`."""
    if not item.texts:
        raise BadRow(f"no caption: there is no {item.image.stem}{TEXTS[0]} beside it")
    if len(item.texts) > 1:
        raise BadRow(f"several captions: {' and '.join(text.name for text in item.texts)}; keep one of them")
    (text,) = item.texts
    try:
        content = read_bytes(text).removeprefix(codecs.BOM_UTF8)
        if b"\0" in content:
            raise BadRow("it is UTF-16 or no text at all; save it as UTF-8")
        first, *others = LINE_END.split(content, maxsplit=1)
        if not first.strip() and others and others[0].strip():
            raise BadRow("its first line is empty, and the caption is the first line")
        return checked_caption(first).strip()
    except BadRow as bad:
        raise BadRow(f"{text.name}: {bad}") from None


def identity(chunks: Sequence[Sequence[Captioned]], folder: Path) -> Identity:
    """The identity of all files: their names, sizes and times."""
    def digest(found: Sequence[Captioned]) -> tuple[str, str]:
        files = [file for item in found for file in (item.image, *item.texts, *([item.loser] if item.loser else []))]
        stamps = [(printable(str(file.relative_to(folder))), *times_of(file)) for file in files]
        return digest_of([[name, stamp] for name, stamp, _ in stamps]), digest_of([when for _, _, when in stamps])

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        found = list(pool.map(digest, chunks))
    return Identity(digest_of([names for names, _ in found]), tuple(written for _, written in found))
