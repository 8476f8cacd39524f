"""A folder of images with a text file of the same name beside each (kohya's layout: `picture.png`, `picture.txt`).

As kohya's scripts read them, the caption is the file's first line, in UTF-8, and the ending is .txt or .caption. Unlike there an
image without one is skipped rather than trained on without a caption, and a number in a folder's name does not repeat its images.
"""

import codecs
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from seppo_fast import config
from seppo_fast.data.columns import refuse_pairs
from seppo_fast.data.files import walk
from seppo_fast.data.metadata import ROWS_PER_PART, STAT_THREADS, digest_of, times_of
from seppo_fast.data.rows import BadRow, Identity, Part, Row, Skipped, Source, checked_caption, printable, read_bytes
from seppo_fast.data.splits import choose, split_of_folders
from seppo_fast.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
TEXTS = (".txt", ".caption")
LINE_END = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True)
class Captioned:
    """An image, and the files that may hold its caption."""

    image: Path
    texts: tuple[Path, ...]


def pairs_in(place: Path, names: Sequence[str]) -> list[Captioned]:
    """The images among a folder's files. Names may differ in the form of accents (a Mac's NFD) and in the case of endings."""
    seen = [name for name in names if not name.startswith(".")]  # "._a.png" is no picture, but what a Mac knows of one
    texts: dict[str, list[Path]] = {}
    for name in seen:
        if suffix(name) in TEXTS:
            texts.setdefault(stem(name), []).append(place / name)
    return [Captioned(place / name, tuple(texts.get(stem(name), ()))) for name in seen if suffix(name) in IMAGES]


def has_captions(place: Path, names: Sequence[str]) -> bool:
    """Whether an image among a folder's files has its caption beside it."""
    return any(suffix(name) in TEXTS for name in names) and any(pair.texts for pair in pairs_in(place, names))


def suffix(name: str) -> str:
    """A name's ending, in lower case."""
    return os.path.splitext(name)[1].lower()


def stem(name: str) -> str:
    """A name without its ending, with accents composed."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def open_captioned(folder: Path, data: config.Data, needs_loser: bool) -> Source:
    """All images under a folder that are of the split, in parts of 256."""
    refuse_pairs(f"the folder of captioned images {folder}", needs_loser, data.choose)
    if given := [key for key in ("image_column", "caption_column") if getattr(data, key) is not None]:
        raise UserError(f"seppo.data.{given[0]}: {folder} has a text file for each image, and no columns; leave the key out")
    found = [pair for place, names in walk(folder) for pair in pairs_in(place, names)]
    if not any(pair.texts for pair in found):
        raise UserError(f"{folder} has no image with a caption beside it (picture.png with picture.txt)")
    splits = [split_of_folders(pair.image.parent.relative_to(folder).parts, data.split) for pair in found]
    unnamed = [str(pair.image.relative_to(folder)) for pair, split in zip(found, splits, strict=True) if split is None]
    chosen = choose(splits, data.split, str(folder), unnamed)
    mine = [pair for pair, split in zip(found, splits, strict=True) if split in chosen]
    chunks = [mine[start : start + ROWS_PER_PART] for start in range(0, len(mine), ROWS_PER_PART)]
    parts = [Part(printable(str(chunk[0].image.relative_to(folder))), len(chunk), partial(rows, chunk, folder)) for chunk in chunks]
    return Source(str(folder), "captions", {"image": "file", "caption": "text file"}, parts, lambda: identity(chunks, folder))


def rows(pairs: Sequence[Captioned], folder: Path) -> Iterator[Row | Skipped]:
    """The rows of one part; the key is the image's name."""
    for pair in pairs:
        key = printable(str(pair.image.relative_to(folder)))
        try:
            yield Row(key, caption_of(pair), pair.image)
        except BadRow as bad:
            yield Skipped(key, str(bad))


def caption_of(pair: Captioned) -> str:
    """The first line of an image's text file, or `BadRow`."""
    if not pair.texts:
        raise BadRow(f"no caption: there is no {pair.image.stem}{TEXTS[0]} beside it")
    if len(pair.texts) > 1:
        raise BadRow(f"several captions: {' and '.join(text.name for text in pair.texts)}; keep one of them")
    (text,) = pair.texts
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
    """Of the names of all files, their sizes and times."""
    def digest(pairs: Sequence[Captioned]) -> tuple[str, str]:
        files = [file for pair in pairs for file in (pair.image, *pair.texts)]
        stamps = [(printable(str(file.relative_to(folder))), *times_of(file)) for file in files]
        return digest_of([[name, stamp] for name, stamp, _ in stamps]), digest_of([when for _, _, when in stamps])

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        found = list(pool.map(digest, chunks))
    return Identity(digest_of([names for names, _ in found]), tuple(written for _, written in found))
