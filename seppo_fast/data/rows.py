"""What every source is made of: parts (units of work) that yield rows, or the reason why a row cannot be used."""

import base64
import errno
import io
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from seppo_fast.errors import UserError
from seppo_fast.opening import NotRegular, open_regular

ImageLike = bytes | Path | Image.Image
IMPOSSIBLE_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EILSEQ, errno.ENXIO)
LONGEST_SHOWN = 120  # characters of a file's name in a message
LONGEST_NAME = 255  # bytes between two slashes, on about every file system
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
SHORTEST_BASE64, SHOWN_BASE64 = 64, 24  # characters; no image file is smaller
LARGEST_IMAGE = 1 << 30  # bytes of an image file


@dataclass(frozen=True)
class Row:
    """A demonstration. `key` is "file:row"; `loser` is there only when the method takes losers from the data.

    Of a clip, `image` is the video file, and `time_lapse` says that its row is marked so.
    """

    key: str
    prompt: str
    image: ImageLike
    loser: ImageLike | None = None
    time_lapse: bool = False


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used. Ties are nobody's fault: they are counted apart from bad rows."""

    key: str
    reason: str
    tie: bool = False


@dataclass(frozen=True)
class Part:
    """A unit of work; each call of `rows()` starts at its beginning. `count`: its number of rows, where that is known."""

    name: str
    count: int | None
    rows: Callable[[], Iterator[Row | Skipped]]


class Identity(NamedTuple):
    """`names`: a digest of the files' names, sizes and times of change (mtime). Other content may be put there with all three kept.

    `written`, of each part: a digest of the times (ctime) that the operating system sets itself, at every write, copy and rename.
    They say that content should be compared. Inodes would add nothing, and are others at each mount of some network file systems.
    """

    names: str
    written: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Demonstrations in a fixed order. `identity()` changes when the files do.

    `root` is the folder that holds the videos.
    """

    name: str
    kind: str
    columns: dict[str, str]
    parts: Sequence[Part]
    identity: Callable[[], Identity]
    root: Path | None = None

    @property
    def count(self) -> int | None:
        """The number of rows, usable or not; None where it is not known without reading them (tars)."""
        counts = [part.count for part in self.parts]
        return None if None in counts else sum(counts)


class BadRow(Exception):
    """Why a row cannot be used; becomes `Skipped`."""


class Tie(BadRow):
    """The annotators preferred neither image."""


def printable(text: str) -> str:
    """`text` without what UTF-8 cannot hold (replaced by "?"): a key must fit into Arrow and JSON."""
    return text.encode("utf-8", "replace").decode()


def checked_caption(value: object) -> str:
    """The caption, or `BadRow` when there is none that a tokenizer could take."""
    if value is None or (isinstance(value, float) and value != value):
        raise BadRow("no caption")
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        raise BadRow(f"the caption is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow("empty caption")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("the caption is not valid UTF-8") from None
    return value


def short(name: object) -> str:
    """A file name for a message: printable, and without its middle where it is long."""
    text = printable(str(name))
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN // 2]}...{text[-LONGEST_SHOWN // 4:]}"


def inside(folder: Path, name: object, what: str = "image", outside: bool = False) -> Path:
    """`folder/name`, with its accents as the disk has them; `BadRow` when the name is missing or leads out of the folder.

    `outside` (`data.allow_outside`) lets it lead out. Links are not looked at: who may make one there may put the file there.
    """
    if name is not None and not isinstance(name, str):
        raise BadRow(f"the {what} file name is {type(name).__name__}, not text")
    if name is None or not name.strip():
        raise BadRow(f"no {what} file name")
    if "\0" in name:
        raise BadRow(f"the {what} file name {short(name)!r} has a zero byte")
    if not outside and (PurePosixPath(name).is_absolute() or os.path.normpath(name).split(os.sep)[0] == ".."):
        raise BadRow(f"the {what} {short(name)!r} is outside the data folder; use paths relative to it, or set"
                     " seppo.data.allow_outside")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise BadRow(f"the {what} file name {short(name)!r} is not valid UTF-8") from None
    path = folder / name
    if name.isascii() or os.path.lexists(path):
        return path
    # A Mac stores "\u00e9" as "e" and an accent (NFD), and metadata are mostly NFC: the names look the same.
    others = (folder / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next(filter(os.path.lexists, others), path)


def looks_embedded(text: str) -> bool:
    """Whether a text is an image's content (a data: URI, base64) rather than a file name."""
    return text.startswith("data:") or len(text) >= SHORTEST_BASE64 and bool(BASE64.fullmatch(text))


def embedded(value: object) -> bytes | None:
    """The image that a text holds (base64 or a data: URI); None for a file name, `BadRow` when it can be neither."""
    if not isinstance(value, str) or not looks_embedded(value):
        return None
    uri = value.startswith("data:")
    try:
        content = base64.b64decode("".join(value.partition("base64,")[2].split()) if uri else "".join(value.split()), validate=True)
        open_image(content)
    except (ValueError, BadRow):
        if not uri and len(value) <= LONGEST_NAME:
            return None
        what = "a data: URI" if uri else "text that looks like base64"
        raise BadRow(f"the image is {what} ({len(value)} characters), but no image that Pillow can read:"
                     f" {value[:SHOWN_BASE64]!r}...") from None
    return content


def unusable_file(path: Path, error: OSError, what: str = "image") -> BadRow | None:
    """Why a row's file cannot be opened; None when that is the disk's or network's fault."""
    if isinstance(error, FileNotFoundError):
        return BadRow(f"no such {what} file: {short(path)}")
    if isinstance(error, NotRegular | IsADirectoryError | NotADirectoryError | PermissionError) or error.errno in IMPOSSIBLE_NAME:
        return BadRow(f"cannot read {short(path)}: {error.strerror}")
    return None


def read_bytes(path: Path) -> bytes:
    """The file's content; `BadRow` when there is none, `UserError` when the disk or network fails."""
    try:
        with open_regular(path) as stream:
            check_size(os.fstat(stream.fileno()).st_size)
            return stream.read()
    except OSError as error:
        if bad := unusable_file(path, error):
            raise bad from None
        raise UserError(f"reading {path} failed: {error.strerror or error}. That is the disk or network rather than the"
                        " image; start again when it is settled, what is cached stays valid") from error


def check_size(size: int) -> None:
    """`BadRow` for a file so large that it cannot be an image and would fill the memory."""
    if size > LARGEST_IMAGE:
        raise BadRow(f"a file of {size:,} bytes; images of up to {LARGEST_IMAGE:,} bytes are read")


def open_image(image: ImageLike | BadRow) -> Image.Image:
    """An opened, not yet decoded PIL image; `BadRow` when it is no image."""
    if isinstance(image, BadRow):
        raise image
    if isinstance(image, Image.Image):
        return image
    content = read_bytes(image) if isinstance(image, Path) else image
    if not content:
        raise BadRow("the image is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(content))
    except Image.UnidentifiedImageError:
        raise BadRow(f"not an image that Pillow can read ({len(content)} bytes)") from None
    except MemoryError:
        raise
    except Exception as error:  # a header that promises gigapixels, or one that a decoder's parser trips over
        raise BadRow(f"not an image that Pillow will open: {error}") from None
