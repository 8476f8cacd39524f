"""Files are complete or not there, and have the permissions that the umask gives."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from seppo_fast.disk import complete_or_not, follow_umask


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """A umask, for one test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_file_takes_its_place_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "grid.png"
    target.write_text("before")
    with complete_or_not(target) as temporary:
        assert temporary.suffix == ".png" and temporary.parent == tmp_path
        temporary.write_text("half")
        assert target.read_text() == "before"
    assert target.read_text() == "half" and os.listdir(tmp_path) == ["grid.png"]


def test_what_stops_in_the_middle_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "config.json"
    for before in (None, "before"):
        if before:
            target.write_text(before)
        with pytest.raises(ZeroDivisionError), complete_or_not(target) as temporary:
            temporary.write_text("half")
            1 / 0  # noqa: B018
        assert [file.read_text() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_tensors_files_follow_the_umask(umask: int, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    follow_umask(tmp_path.glob("*.safetensors"))
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {
        "a.safetensors": 0o666 & ~umask, "b.safetensors": 0o666 & ~umask}
