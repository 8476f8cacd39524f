"""PNGs and colour profiles that Pillow does not write, for the tests of the data section."""

import struct
import zlib
from collections.abc import Sequence

ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))  # red, green, blue in D50
DISPLAY_P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
WHITE = (0.9642, 1.0, 0.82491)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(depth: int, kind: int, row: bytes, *chunks: tuple[bytes, bytes], width: int = 2) -> bytes:
    """A PNG of two equal rows; `kind`: 0 grey, 2 colours, 3 palette, 4 grey and alpha."""
    header = struct.pack(">2I5B", width, 2, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(2 * (b"\0" + row))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def profile(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile, version 2."""
    text = b"test\0"
    tags = {b"desc": b"desc" + struct.pack(">2I", 0, len(text)) + text + bytes(78), b"cprt": b"text\0\0\0\0" + text,
            b"wtpt": xyz(WHITE), **tags}
    table, content, place = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">2I", place + len(content), len(value))
        content += value
    header = struct.pack(">I4xI4s4s4s12x4s", place + len(content), 0x02100000, kind, space, connection, b"acsp")
    header = header.ljust(68, b"\0") + b"".join(s15(value) for value in WHITE)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


def rgb_profile(primaries: Sequence[Sequence[float]], gamma: float) -> bytes:
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    return profile(b"RGB ", dict(zip(names, map(xyz, primaries), strict=True)) |
                   {name: curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": curve(gamma)})


def cmyk_profile(ink: tuple[int, int, int], paper: tuple[int, int, int] = (255, 128, 128)) -> bytes:
    """Whatever ink there is, it is of one colour (8-bit Lab)."""
    ramp = bytes(range(256))
    corners = b"".join(bytes(ink if corner else paper) for corner in range(16))
    identity = b"".join(s15(value) for value in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    table = b"mft1" + struct.pack(">I4B", 0, 4, 3, 2, 0) + identity + 4 * ramp + corners + 3 * ramp
    return profile(b"CMYK", {name: table for name in (b"A2B0", b"A2B1", b"A2B2")}, b"Lab ", b"prtr")


def xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(s15, values))


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def curve(gamma: float) -> bytes:
    return b"curv" + struct.pack(">2IH", 0, 1, round(gamma * 256)) + b"\0\0"
