"""A checksum that is made while a file is written is the file's, and any flipped bit changes it."""

from pathlib import Path

import torch
import xxhash

from seppo_fast.checksums import CHUNK, Hashing, checksum


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        hashing = Hashing(file)
        torch.save({"weight": torch.arange(CHUNK // 2, dtype=torch.float32)}, hashing)
        hashing.write(memoryview(torch.arange(6, dtype=torch.int16).numpy()))  # bytes, not elements, are counted
    assert hashing.size == (tmp_path / "file").stat().st_size > CHUNK
    assert hashing.hexdigest() == checksum(tmp_path / "file") == xxhash.xxh3_128_hexdigest((tmp_path / "file").read_bytes())


def test_a_flipped_bit_shows(tmp_path: Path) -> None:
    data = bytearray(3 * CHUNK)
    (tmp_path / "file").write_bytes(data)
    before = checksum(tmp_path / "file")
    data[2 * CHUNK + 5] ^= 4
    (tmp_path / "file").write_bytes(data)
    assert checksum(tmp_path / "file") != before
