"""Whether a container file is as long as its headers say: FFmpeg reads a file that was cut off without any message."""

import os
from pathlib import Path
from typing import BinaryIO

from seppo_fast.data.rows import BadRow
from seppo_fast.opening import open_regular

EBML, SEGMENT, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")


def check_whole(file: Path) -> None:
    """`BadRow` when the file is empty, cut off, or of elements (Matroska, WebM) that do not fit together."""
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size == 0:
            raise BadRow("the video is empty (0 bytes)")
        start = stream.read(12)
        stream.seek(0)
        if int.from_bytes(start[:4]) == EBML:
            check_matroska(stream, size)
        elif start[4:8] in BOXES:
            check_length(boxes_end(stream, size), size)


def check_length(end: int, size: int) -> None:
    if end > size:
        raise BadRow(f"truncated video: it has {size} of {end} bytes")


def check_matroska(stream: BinaryIO, size: int) -> None:
    """The segment, and in it the clusters and their blocks, one beside the other; as far as their writer knew the lengths."""
    _, length = element(stream)
    stream.seek(length or 0, os.SEEK_CUR)
    name, length = element(stream)
    if name != SEGMENT or length is None:
        return
    end = stream.tell() + length
    check_length(end, size)
    ends = [end]
    while ends:
        if stream.tell() == ends[-1]:
            ends.pop()
            continue
        name, length = element(stream)
        if length is None and name == CLUSTER:  # a live recording: nothing can be said
            return
        if length is None or stream.tell() + length > ends[-1]:
            raise BadRow(f"damaged video: an element at byte {stream.tell()} does not fit into its surroundings")
        if name == CLUSTER:
            ends.append(stream.tell() + length)
        else:
            stream.seek(length, os.SEEK_CUR)


def element(stream: BinaryIO) -> tuple[int, int | None]:
    """(id, length) of the EBML element here; no length where it is unknown (all ones), or where there is no element."""
    first = stream.read(1)
    if not first or first[0] < 0x10:
        return 0, None
    name = int.from_bytes(first + stream.read(8 - first[0].bit_length()))
    first = stream.read(1)
    if not first or not first[0]:
        return name, None
    more = 8 - first[0].bit_length()
    marker = 1 << 7 * (more + 1)
    length = int.from_bytes(first + stream.read(more)) - marker
    return name, None if length == marker - 1 else length


def boxes_end(stream: BinaryIO, size: int) -> int:
    """Where the last of the top-level boxes ends."""
    end = 0
    while end + 8 <= size:
        stream.seek(end)
        header = stream.read(16)
        length = int.from_bytes(header[:4])
        if length == 1 and len(header) == 16:
            length = int.from_bytes(header[8:])
        if length == 0:  # to the end of the file
            return size
        if length < 8:  # no box; what comes before it counts
            return end
        end += length
    return end
