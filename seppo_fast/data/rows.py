"""What every source is made of: parts (units of work) that yield rows, or the reason why a row cannot be used."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from seppo_fast.errors import UserError

ImageLike = bytes | Path | Image.Image


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
    """A unit of work; `rows()` starts from its beginning each time. `count`: how many rows, where that is known."""

    name: str
    count: int | None
    rows: Callable[[], Iterator[Row | Skipped]]


@dataclass(frozen=True)
class Source:
    """Demonstrations in a fixed order. `identity()` changes when the files do (names, sizes, times of change).

    `root` is the folder that holds the videos.
    """

    name: str
    kind: str
    columns: dict[str, str]
    parts: Sequence[Part]
    identity: Callable[[], str]
    root: Path | None = None

    @property
    def count(self) -> int | None:
        """Rows in all, usable or not; None where only reading them tells (tars)."""
        counts = [part.count for part in self.parts]
        return None if None in counts else sum(counts)


class BadRow(Exception):
    """Why a row cannot be used; becomes `Skipped`."""


class Tie(BadRow):
    """The annotators preferred neither image."""


def printable(text: str) -> str:
    """`text` with whatever UTF-8 cannot hold replaced: a key must fit into Arrow and JSON."""
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


def inside(folder: Path, name: object, what: str = "image") -> Path:
    """`folder/name`; `BadRow` when the name is missing or would lead out of the folder."""
    if not isinstance(name, str) or not name.strip():
        raise BadRow(f"no {what} file name")
    if PurePosixPath(name).is_absolute() or os.path.normpath(name).split(os.sep)[0] == ".." or "\0" in name:
        raise BadRow(f"the {what} {printable(name)!r} is outside the data folder; use paths relative to it")
    return folder / name


def read_bytes(path: Path) -> bytes:
    """The file's content; `BadRow` when there is none, `UserError` when the disk or network fails."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadRow(f"no such image file: {printable(str(path))}") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise BadRow(f"cannot read {printable(str(path))}: {error.strerror}") from None
    except OSError as error:
        raise UserError(f"reading {path} failed: {error.strerror or error}. That is the disk or network rather than the"
                        " image; start again when it is settled, what is cached stays valid") from error


def open_image(image: ImageLike) -> Image.Image:
    """An opened, not yet decoded PIL image; `BadRow` when it is no image."""
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
