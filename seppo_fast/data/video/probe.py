"""Reads each video to its end before it is used: whether that works, and what the video is."""

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from seppo_fast.data.colours import check_range
from seppo_fast.data.metadata import stamp_of
from seppo_fast.data.rows import BadRow, printable, short, unusable_file
from seppo_fast.data.video.containers import check_whole
from seppo_fast.errors import UserError
from seppo_fast.extras import need

CONTAINERS = {".mp4": "mov", ".mov": "mov", ".webm": "matroska", ".mkv": "matroska"}
UNREADABLE = "reading {} failed: {}. That is the disk or network rather than the video; start again when it is settled, what is" \
             " done stays valid"
# The display matrix (a, b, c, d), its signs alone, of each number of quarter turns counterclockwise.
QUARTERS = {(1, 0, 0, 1): 0, (0, -1, 1, 0): 1, (-1, 0, 0, -1): 2, (0, 1, -1, 0): 3}
UNSAID = 2  # of H.273
MATRICES = {0, 1, 3, 4, 5, 6, 7, 9}  # of H.273: FFmpeg reads any other as BT.601
DOLBY_VISION = {"dvh1", "dvhe", "dav1"}  # the names of streams that nothing but Dolby Vision shows in their colours
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # the decoders that read WebM's alpha, which FFmpeg's own leave out


@dataclass(frozen=True)
class Facts:
    """A video as it is stored. To be shown, it is mirrored first (if at all), then turned by `quarters` x 90 degrees to the left.

    `pixel` is a pixel's width over its height, as a fraction; `colours` FFmpeg's (matrix, range); `stamp` size and time of change.
    `stream` is the film's number in the file, `alone` whether no other stream has pictures, `cut` whether an edit list leaves out
    frames, `alpha` whether it may be transparent. `written` and `content` are its ctime and its digest, or None.
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
    stream: int = 0
    alone: bool = True
    cut: bool = False
    alpha: bool = False
    written: int | None = None
    content: str | None = None

    @staticmethod
    def of(values: dict[str, Any]) -> "Facts":
        """The facts that `asdict` and JSON made of them."""
        return Facts(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def need_av() -> Any:
    """The `av` module; `UserError` where it is not installed."""
    return need("av", "reading videos", "seppo-fast[video]")


def probe(file: Path) -> Facts:
    """Reads the whole file once and decodes every frame; whatever FFmpeg complains about is a reason to skip the file.

    Found are files that are empty, cut off, of another kind than their name says, without a video, or of changing size, damage to
    the structure of Matroska and WebM, and what a decoder notices: some of single flipped bits in H.264, fewer in MJPEG.
    Other damage to the pictures themselves decodes to wrong pixels without a word, in VP8 and VP9, which have no checks, always.
    """
    av = need_av()
    stamp = checked_stamp(file)
    try:
        with av.open(url_of(file), options={"err_detect": "explode"}, metadata_errors="replace") as container:
            names = container.format.name
            if CONTAINERS[file.suffix.lower()] not in names.split(","):
                raise BadRow(f"its name says {file.suffix}, its content is {names}")
            stream = film(av, container)
            context = decoder_of(av, stream)
            context.options = {"err_detect": "explode"}
            return facts_of(stream, decoded(container, stream, context), stamp)
    except (MemoryError, BadRow):
        raise
    except Exception as error:  # FFmpeg's many, and what PyAV trips over
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise UserError(UNREADABLE.format(file, error.strerror)) from error
        reason = getattr(error, "strerror", None) or error
        raise BadRow(f"unreadable, truncated or damaged video: {printable(str(reason))}") from None


def url_of(file: Path) -> str:
    """A file as FFmpeg is told of it: `pipe:x/a.mp4` alone would be a protocol."""
    return f"file:{file}"


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


def film(av: Any, container: Any) -> Any:
    """The video stream that FFmpeg (and DALI with it) takes for the main one; `BadRow` when there is none that moves."""
    stream = container.streams.best("video")
    if stream is None:
        raise BadRow("it has no video stream" if not container.streams.video else "FFmpeg has no decoder for it")
    if stream.codec_context is None:
        raise BadRow("FFmpeg has no decoder for it")
    kinds = av.stream.Disposition
    if stream.disposition & (kinds.attached_pic | kinds.timed_thumbnails | kinds.still_image):
        raise BadRow("its only video is a still picture")
    if stream.codec_context.codec_tag in DOLBY_VISION:
        raise BadRow("its colours are Dolby Vision's; convert it to SDR (BT.709)")
    return stream


def decoder_of(av: Any, stream: Any) -> Any:
    """The codec context that decodes the stream with its transparency."""
    context = stream.codec_context
    marks = {name.lower(): value for name, value in stream.metadata.items()}
    if marks.get("alpha_mode") == "1":
        name = WITH_ALPHA.get(context.codec.canonical_name)
        if name is None or name not in av.codecs_available:
            raise BadRow(f"it is transparent in parts, which FFmpeg here does not read of {context.codec.canonical_name}")
        extradata, context = context.extradata, av.CodecContext.create(name, "r")
        context.extradata = extradata
    context.thread_count = 1
    return context


def decoded(container: Any, stream: Any, context: Any) -> Iterator[Any]:
    """Every frame, in the order of presentation; `BadRow` at what FFmpeg itself calls corrupt."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise BadRow("a part of it is damaged or missing")
        for frame in context.decode(packet):
            if frame.is_corrupt:
                raise BadRow("a frame of it is damaged")
            yield frame


def facts_of(stream: Any, frames: Iterator[Any], stamp: tuple[int, int]) -> Facts:
    """What the container and the first frame tell, and how many frames follow."""
    container = colours_of(stream.codec_context)  # before a frame is decoded, which overwrites it
    first = next(frames, None)
    if first is None:
        raise BadRow("it has no frames")
    quarters, mirrored = orientation(first)
    count, size, look = 0, (first.width, first.height), None
    for frame in chain([first], frames):
        count += 1
        if (frame.width, frame.height) != size:
            raise BadRow(f"its pictures change their size: {size[0]}x{size[1]}, then {frame.width}x{frame.height}")
        colours = [of_frame or of_container for of_frame, of_container in zip(colours_of(frame), container, strict=True)]
        check_colours(*colours[:3])
        if frame.interlaced_frame:
            raise BadRow("it is interlaced: each frame shows two moments, line by line; deinterlace it (FFmpeg's bwdif)")
        before, look = look, (frame.format.name, *colours)
        if before not in (None, look):
            raise BadRow(f"its pictures change their pixels or colours: {before}, then {look}")
    form, _, _, matrix, range_ = look
    pixel = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    return Facts(count, *size, (pixel.numerator, pixel.denominator) if pixel else (1, 1), quarters, mirrored,
                 stream.codec_context.codec.canonical_name, form, (matrix or UNSAID, range_), stamp, stream.index,
                 alone=len(stream.container.streams.video) == 1, cut=any(entry.is_discard for entry in stream.index_entries),
                 alpha=first.format.has_palette or any(part.is_alpha for part in first.format.components))


def colours_of(source: Any) -> tuple[int | None, int | None, int | None, int]:
    """(primaries, transfer, matrix, range) of a frame or codec context, as FFmpeg numbers them; None or 0 for what is not said.

    Some decoders (ProRes) take what the stream does not say for more than what the container says.
    """
    primaries, transfer, matrix = (None if number == UNSAID else number for number in map(int, (
        source.color_primaries, source.color_trc, source.colorspace)))
    return primaries, transfer, matrix, int(source.color_range)


def check_colours(primaries: int | None, transfer: int | None, matrix: int | None) -> None:
    """`BadRow` for what FFmpeg would decode to other colours than it shows."""
    check_range(primaries, transfer)
    if matrix is not None and matrix not in MATRICES:
        raise BadRow(f"its colour matrix is number {matrix} of H.273, which FFmpeg does not convert; convert it to BT.709")


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
