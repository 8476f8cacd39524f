"""Whether a video can be read to its end, and what it is: every file is looked at before it may enter a batch."""

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seppo_fast.data.metadata import stamp_of
from seppo_fast.data.rows import BadRow, printable, short, unusable_file
from seppo_fast.data.video.containers import check_whole
from seppo_fast.errors import UserError

CONTAINERS = {".mp4": "mov", ".mov": "mov", ".webm": "matroska", ".mkv": "matroska"}
UNREADABLE = "reading {} failed: {}. That is the disk or network rather than the video; start again when it is settled, what is" \
             " done stays valid"
# The display matrix (a, b, c, d), its signs alone, of each number of quarter turns counterclockwise.
QUARTERS = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 1, (-1, 0, 0, -1): 2, (0, 1, -1, 0): 3}


@dataclass(frozen=True)
class Facts:
    """A video as it is stored. To be shown, it is mirrored first (if at all), then turned by `quarters` x 90 degrees to the left.

    `pixel` is a pixel's width over its height, as a fraction; `colours` FFmpeg's (matrix, range); `stamp` size and time of change.
    """

    frames: int
    width: int
    height: int
    pixel: tuple[int, int]
    quarters: int
    mirrored: bool
    codec: str
    format: str
    colours: tuple[int, int]
    stamp: tuple[int, int]

    @staticmethod
    def of(values: dict[str, Any]) -> "Facts":
        """The facts that `asdict` and JSON made of them."""
        return Facts(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def need_av() -> Any:
    """The `av` module; `UserError` where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"videos need PyAV, which is not here ({error}): pip install 'seppo-fast[video]'") from error
    return av


def probe(file: Path) -> Facts:
    """Reads the whole file once, decodes every frame, and takes whatever FFmpeg complains about for a reason to skip it.

    Found are files that are empty, cut off, of another kind than their name says, without a video, or of changing size, damage to
    the structure of Matroska and WebM, and what a decoder notices: some of single flipped bits in H.264, fewer in MJPEG.
    Other damage to the pictures themselves decodes to wrong pixels without a word, in VP8 and VP9, which have no checks, always.
    """
    av = need_av()
    stamp = checked_stamp(file)
    try:
        with av.open(str(file), options={"err_detect": "explode"}, metadata_errors="replace") as container:
            names = container.format.name
            if CONTAINERS[file.suffix.lower()] not in names.split(","):
                raise BadRow(f"its name says {file.suffix}, its content is {names}")
            if not container.streams.video:
                raise BadRow("it has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadRow("FFmpeg has no decoder for it")
            if stream.disposition & av.stream.Disposition.attached_pic:
                raise BadRow("its first video stream is a still picture")
            stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = 1
            return facts_of(stream, decoded(container, stream), stamp)
    except (MemoryError, BadRow):
        raise
    except Exception as error:  # FFmpeg's many, and what PyAV trips over
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise UserError(UNREADABLE.format(file, error.strerror)) from error
        reason = getattr(error, "strerror", None) or error
        raise BadRow(f"unreadable, truncated or damaged video: {printable(str(reason))}") from None


def checked_stamp(file: Path) -> tuple[int, int]:
    """The file's stamp, once its first bytes could be read and say that it is whole; `BadRow` otherwise."""
    if file.suffix.lower() not in CONTAINERS:
        raise BadRow(f"{short(file.name)} is none of {', '.join(CONTAINERS)}")
    try:
        check_whole(file)
    except OSError as error:
        if bad := unusable_file(file, error, "video"):
            raise bad from None
        raise UserError(UNREADABLE.format(file, error.strerror or error)) from error
    stamp = stamp_of(file)
    if isinstance(stamp, str):
        raise BadRow(f"no such video file: {short(file)}")
    return tuple(stamp)


def decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Every frame, in the order of presentation; `BadRow` at what FFmpeg itself calls corrupt."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise BadRow("a part of it is damaged or missing")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise BadRow("a frame of it is damaged")
            yield frame


def facts_of(stream: Any, frames: Iterator[Any], stamp: tuple[int, int]) -> Facts:
    """What the first frame tells, and how many follow."""
    first = next(frames, None)
    if first is None:
        raise BadRow("it has no frames")
    count, size = 1, (first.width, first.height)
    quarters, mirrored = orientation(first)
    form, colours = first.format.name, (int(first.colorspace), int(first.color_range))
    for frame in frames:
        count += 1
        if (frame.width, frame.height) != size:
            raise BadRow(f"its pictures change their size: {size[0]}x{size[1]}, then {frame.width}x{frame.height}")
    pixel = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    pixel = (pixel.numerator, pixel.denominator) if pixel else (1, 1)
    return Facts(count, *size, pixel, quarters, mirrored, stream.codec_context.codec.canonical_name, form, colours, stamp)


def orientation(frame: Any) -> tuple[int, bool]:
    """(quarter turns to the left, mirrored before) of the frame's display matrix."""
    data = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return 0, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
    largest = max(map(abs, (a, b, c, d)))
    a, b, c, d = (round(value / largest) if largest else 0 for value in (a, b, c, d))
    mirrored = a * d - b * c < 0
    turn = (-a, -b, c, d) if mirrored else (a, b, c, d)
    if turn not in QUARTERS:
        raise BadRow("its display matrix turns it by no multiple of 90 degrees")
    return QUARTERS[turn], mirrored
