"""Whether a container file is as long as its own headers say: FFmpeg reads a file that was cut off without a word."""

import os
from pathlib import Path
from typing import BinaryIO

from seppo_fast.data.rows import BadRow

EBML, SEGMENT = 0x1A45DFA3, 0x18538067


def check_whole(file: Path) -> None:
    """`BadRow` when the file is empty, or ends before its boxes (MP4, MOV) or its segment (Matroska, WebM) do."""
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size == 0:
            raise BadRow("the video is empty (0 bytes)")
        start = stream.read(12)
        stream.seek(0)
        end = 0
        if int.from_bytes(start[:4]) == EBML:
            end = matroska_end(stream)
        elif start[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
            end = boxes_end(stream, size)
        if end > size:
            raise BadRow(f"truncated video: it has {size} of {end} bytes")


def matroska_end(stream: BinaryIO) -> int:
    """Where the first segment ends; 0 where its writer did not know (a live recording)."""
    length = element(stream)[1]
    if length is None:
        return 0
    stream.seek(length, os.SEEK_CUR)
    name, length = element(stream)
    return stream.tell() + length if name == SEGMENT and length is not None else 0


def element(stream: BinaryIO) -> tuple[int, int | None]:
    """(id, length) of the EBML element here; a length of ones alone means unknown."""
    values = []
    for keep_marker in (True, False):
        first = stream.read(1)
        if not first or not first[0]:
            return 0, None
        more = 8 - first[0].bit_length()
        value = int.from_bytes(first + stream.read(more))
        marker = 1 << (7 * (more + 1))
        values.append(value if keep_marker else None if value == 2 * marker - 1 else value - marker)
    return values[0], values[1]


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
