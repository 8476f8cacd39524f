"""Runs whose checkpoints were damaged or cut off in the middle: the newest whole one is taken."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forks

NEWEST, BEFORE = "update_00000004", "update_00000003"
SHARE = "rank_0.safetensors"


@pytest.fixture(scope="module")
def made() -> list[dict[str, Any]]:
    """The configuration of the run below, once it is made."""
    return []


@pytest.fixture
def copied(made: list[dict[str, Any]], settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path,
           tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """`copied(name)`: the configuration of a copy of a finished run of four updates with a grid and a checkpoint each."""

    def copy(name: str) -> dict[str, Any]:
        if not made:
            raw = settings(**{"seppo.output_dir": str(tmp_path_factory.mktemp("finished") / "run"), "seppo.checkpoint.every": 1,
                              "seppo.samples": {"every": 1, "prompts": ["a one"]}})
            result = forks.run(raw)
            assert result.status == 0, result.output[-2000:]
            made.append(raw)
        raw = json.loads(json.dumps(made[0]))
        raw["seppo"]["output_dir"] = str(shutil.copytree(made[0]["seppo"]["output_dir"], tmp_path / name))
        return raw

    return copy


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_newest_is_damaged_in_a_folder_whose_name_is_a_pattern(copied: Any, forks: Forks, tmp_path: Path) -> None:
    """`exp1` beside `exp[1]` must not matter, and neither a grid that was not drawn before the end."""
    raw, beside = copied("exp[1]"), Path(copied("exp1")["seppo"]["output_dir"])
    run = Path(raw["seppo"]["output_dir"])
    whole, grids = files(run / "final"), files(run / "samples")
    for path in (beside / "checkpoints").glob("update_*"):
        shutil.copy(path / "policy.safetensors", path / SHARE)  # what would be loaded by the pattern
    shutil.rmtree(run / "final")
    flip(run / "checkpoints" / NEWEST / SHARE)
    (run / "samples" / f"{BEFORE}.png").unlink()
    (run / "samples" / f".tmp-{BEFORE}.png").write_bytes(b"half")
    result = forks.run(raw, "--resume", "auto")
    assert result.status == 0, result.output[-2000:]
    assert f"ignored the checkpoint {run / 'checkpoints' / NEWEST}: {SHARE} is damaged: its checksum is not" in result.output
    assert f"resuming from {run / 'checkpoints' / BEFORE}\n" in result.output
    assert f"set aside the later checkpoint {NEWEST} as {run / 'checkpoints' / f'set_aside_{NEWEST}'}" in result.output
    assert files(run / "final") == whole and files(run / "samples") == grids
    assert sorted(os.listdir(run / "checkpoints")) == [f"set_aside_{NEWEST}", BEFORE, NEWEST]


def test_all_are_damaged(copied: Any, forks: Forks) -> None:
    raw = copied("run")
    run = Path(raw["seppo"]["output_dir"])
    (run / "checkpoints" / NEWEST / "complete.json").write_text("null")
    flip(run / "checkpoints" / BEFORE / "rank_0.safetensors")
    before = files(run)
    for resume in ("auto", str(run / "checkpoints" / BEFORE)):
        result = forks.run(raw, "--resume", resume)
        assert result.status == 2 and "Traceback" not in result.output and result.output.count("seppo_fast: ") == 1
        assert "rank_0.safetensors is damaged" in result.output
        assert files(run) == before
    result = forks.run(raw, "--resume", "auto")
    assert "none of the checkpoints in" in result.output and f"{NEWEST}: its complete.json cannot be read (" in result.output


def test_files_of_a_run_follow_the_umask(copied: Any) -> None:
    before = os.umask(0o022)
    os.umask(before)
    run = Path(copied("run")["seppo"]["output_dir"])
    modes = {file.relative_to(run): stat.S_IMODE(file.stat().st_mode) for file in run.rglob("*.safetensors")}
    assert len(modes) > 6 and set(modes.values()) == {0o666 & ~before}, modes
