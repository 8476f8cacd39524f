"""Checksums of files: 128-bit XXH3. They find damage, not tampering, and are computed faster than a disk reads."""

from pathlib import Path
from typing import Any, BinaryIO

import xxhash

CHUNK = 1 << 20


class Hashing:
    """A binary stream to write to; `hexdigest` is the checksum of all that was written, `size` its length in bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._hash, self.size = stream, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        """Write all of `data` (any buffer) and add it to the checksum."""
        self._stream.write(data)
        self._hash.update(data)
        written = memoryview(data).nbytes
        self.size += written
        return written

    def flush(self) -> None:
        """Flush the underlying stream."""
        self._stream.flush()

    @property
    def closed(self) -> bool:
        """Whether the underlying stream is closed; Arrow asks."""
        return self._stream.closed

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return self._hash.hexdigest()


def checksum(path: Path) -> str:
    """A file's checksum, 32 hexadecimal digits; `OSError` where it cannot be read."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_of(data: Any) -> str:
    """The checksum of a buffer's bytes, 32 hexadecimal digits."""
    return xxhash.xxh3_128(data).hexdigest()
