"""The past policies of a resumed run: made again from a checkpoint where one has them, or named before anything is loaded."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from seppo_fast.configfile import Config, parse_config
from seppo_fast.errors import UserError
from seppo_fast.reference import Pool
from seppo_fast.training.checkpoint import State
from seppo_fast.training.marker import declare
from seppo_fast.training.past import check_past

DONE = 3  # iterations of two updates, of five


@pytest.fixture
def config() -> Config:
    """A run of which three iterations are done; the rest is drawn by the latest policy, the third."""
    return parse_config({"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "seppo": {
        "model": {"path": "none"}, "reference": "latest", "iterations": 5, "updates_per_iteration": 2}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the pool's policies 0 to 3 and the checkpoints of the second and third iteration's ends."""
    pool = Pool(tmp_path / "pool", torch.float32, 0)
    for index in range(DONE + 1):
        pool.add(index, policy(index), write=True)
    for index in (2, 3):
        folder = tmp_path / "checkpoints" / f"update_{2 * index:08d}"
        folder.mkdir(parents=True)
        save_file(policy(index), folder / "policy.safetensors")
        state = State("a", 1, None, {}, update=2 * index, pool={f"policy_{i:05d}.safetensors": pool.checksums[
            f"policy_{i:05d}.safetensors"] for i in range(index + 1)})
        (folder / "state.json").write_text(json.dumps(asdict(state)))
        declare(folder, {})
    return tmp_path


def policy(index: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((50,), float(index))}


def state_of(run: Path) -> State:
    return State(**json.loads((run / "checkpoints" / "update_00000006" / "state.json").read_text()))


def flip(file: Path) -> bytes:
    """Change one bit; returns what was there."""
    content = bytearray(file.read_bytes())
    whole = bytes(content)
    content[-1] ^= 1
    file.write_bytes(content)
    return whole


@pytest.mark.parametrize("lost", [False, True])
def test_a_policy_is_made_again_from_its_checkpoint(lost: bool, run: Path, config: Config, ranks: Any,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "pool" / "policy_00003.safetensors"
    whole = flip(file)
    if lost:
        file.unlink()
    check_past(config, run, state_of(run), ranks)
    assert file.read_bytes() == whole
    source = run / "checkpoints" / "update_00000006"
    assert f"{file} was damaged or lost, and is made again from {source}" in capsys.readouterr().out


def test_where_no_checkpoint_has_it_the_one_to_go_on_from_is_named(run: Path, config: Config, ranks: Any) -> None:
    file = run / "pool" / "policy_00003.safetensors"
    flip(file)
    flip(run / "checkpoints" / "update_00000006" / "policy.safetensors")
    broken = file.read_bytes()
    with pytest.raises(UserError, match=rf"{file}: cannot be read \(its checksum is not") as caught:
        check_past(config, run, state_of(run), ranks)
    assert f"go on with --resume {run / 'checkpoints' / 'update_00000004'}, which makes them again" in str(caught.value)
    assert file.read_bytes() == broken


def test_the_first_policy_is_in_no_checkpoint(run: Path, config: Config, ranks: Any) -> None:
    (run / "pool" / "policy_00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"pool lacks past policies \[0\].*: restore from a copy, or start anew in another"):
        check_past(config, run, state_of(run), ranks)


def test_what_the_rest_of_the_run_does_not_draw_by_is_not_read(run: Path, config: Config, ranks: Any) -> None:
    flip(run / "pool" / "policy_00001.safetensors")
    check_past(config, run, state_of(run), ranks)
