"""A past policy that is not as it was written is never the reference."""

import os
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from seppo_fast.checksums import checksum
from seppo_fast.errors import UserError
from seppo_fast.reference import Pool


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def filled(folder: Path) -> Pool:
    """A pool of two policies, on disk alone."""
    pool = Pool(folder, torch.float32, 0)
    for index in range(2):
        pool.add(index, dict(network(index).named_parameters()), write=True)
    return pool


def flip(file: Path) -> None:
    """Change one bit of the last weight."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_what_is_written_has_its_checksum(tmp_path: Path) -> None:
    pool = filled(tmp_path)
    assert pool.checksums == {path.name: checksum(path) for path in tmp_path.iterdir()} and len(pool.checksums) == 2
    assert pool.flaw(0) is pool.flaw(1) is None
    pool.truncate(0)
    assert [*pool.checksums] == ["policy_00000.safetensors"]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_flipped_bit_is_found_before_anything_is_copied(ahead: bool, tmp_path: Path) -> None:
    known = filled(tmp_path).checksums
    flip(tmp_path / "policy_00001.safetensors")
    reference = network(9)
    before = {name: p.clone() for name, p in reference.named_parameters()}
    pool = Pool(tmp_path, torch.float32, 10**6 if ahead else 0, known)
    assert pool.flaw(0) is None and pool.flaw(1) == "its checksum is not the one of what was written"
    if ahead:
        pool.prefetch(1)
    with pytest.raises(UserError, match=r"policy_00001.safetensors: cannot be read \(its checksum is not"):
        pool.load_into(1, reference)
    assert all(torch.equal(p, before[name]) for name, p in reference.named_parameters())
    pool.load_into(0, reference)


def test_pools_from_before_there_were_checksums(tmp_path: Path) -> None:
    filled(tmp_path)
    pool = Pool(tmp_path, torch.float32, 0)
    pool.load_into(1, network(9))
    assert pool.flaw(1) is None
    os.truncate(tmp_path / "policy_00001.safetensors", 30)
    assert pool.flaw(1) is not None


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        filled(tmp_path / "pool")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "pool").iterdir()} == {0o644}
