"""DeepSpeed's files: tensors alone are read, from the folder that was named, whatever is in its name; code in them is not run."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import nn

from seppo_fast.checksums import checksum
from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.errors import UserError
from seppo_fast.training.deepspeed_files import load, save
from seppo_fast.training.engine import start_engine
from seppo_fast.training.marker import declare

MODEL = "deepspeed/mp_rank_00_model_states.pt"
Engine = Callable[..., DeepSpeedEngine]


@pytest.fixture
def engine(ranks: Any) -> Engine:
    """`engine(seed, **sections)`: DeepSpeed's engine for two small layers, as a run starts it."""

    def make(seed: int = 0, **sections: Any) -> DeepSpeedEngine:
        torch.manual_seed(seed)
        raw = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
               "seppo": {"model": {"path": "none"}}, **sections}
        config = parse_config(raw)
        dtype = torch.bfloat16 if "bf16" in sections else torch.float32
        return start_engine(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(dtype), config, batch_plan(config.deepspeed, 1))

    return make


def train(engine: DeepSpeedEngine, steps: int) -> list[float]:
    """Losses of some updates on fixed numbers."""
    losses = []
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        rows = torch.randn(2, 4, generator=generator).to(next(engine.module.parameters()).dtype)
        loss = engine(rows).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def written(engine: DeepSpeedEngine, folder: Path) -> Path:
    """A folder with DeepSpeed's files and a marker."""
    folder.mkdir(parents=True)
    declare(folder, save(engine, folder))
    return folder


@pytest.mark.parametrize("sections", [
    {}, {"zero_optimization": {"stage": 1}}, {"zero_optimization": {"stage": 3}}, {"bf16": {"enabled": True}},
    {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9, "warmup_max_lr": 1e-2, "warmup_type": "linear"}}},
    {"scheduler": {"type": "MultiStepLR", "params": {"milestones": [4, 6]}}},
], ids=str)
def test_what_is_saved_is_loaded_and_trains_on_in_the_same_way(sections: dict[str, Any], engine: Engine, tmp_path: Path) -> None:
    first = engine(**sections)
    train(first, 3)
    folder = written(first, tmp_path / "update_00000003")
    other = engine(1, **sections)
    load(other, folder)
    assert train(other, 4) == train(first, 4)


def test_sums_are_those_of_the_files(engine: Engine, tmp_path: Path) -> None:
    sums = save(engine(zero_optimization={"stage": 1}), tmp_path)
    assert sorted(sums) == ["deepspeed/mp_rank_00_model_states.pt", "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    for name, each in sums.items():
        assert each.xxh3_128 == checksum(tmp_path / name) and each.size == (tmp_path / name).stat().st_size


@pytest.mark.parametrize("name", ["exp[1]", "a*b", "a?b", "with space", "{x}"])
def test_a_folder_whose_name_is_a_pattern_is_itself(name: str, engine: Engine, tmp_path: Path) -> None:
    """`exp[1]` beside `exp1`: DeepSpeed would load the other run's."""
    own, other = engine(1), engine(2)
    for match in ("exp1", "aXb"):
        written(other, tmp_path / match / "update_00000001")
    folder = written(own, tmp_path / name / "update_00000001")
    now = engine(3)
    load(now, folder)
    assert torch.equal(now.module[0].weight, own.module[0].weight)
    assert not torch.equal(now.module[0].weight, other.module[0].weight)


class Touch:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(engine: Engine, tmp_path: Path) -> None:
    folder = written(engine(), tmp_path / "update_00000001")
    trap = tmp_path / "it ran"
    for content in ({"module": Touch(trap)}, Touch(trap)):
        torch.save(content, folder / MODEL)
        declare(folder, {})  # the sums are right: whoever can write into the folder can write the marker
        with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt is damaged, or holds more than .* was not run") as caught:
            load(engine(), folder)
        assert "--resume PATH" in str(caught.value)
    (folder / MODEL).write_bytes(pickle.dumps(Touch(trap)))
    with pytest.raises(UserError, match="was not run"):
        load(engine(), folder)
    assert not trap.exists()


@pytest.mark.parametrize("content", [{}, {"module": 5}, [], 3.0, {"module": {}, "dp_world_size": "two"}])
def test_a_file_that_holds_something_else(content: Any, engine: Engine, tmp_path: Path) -> None:
    folder = written(engine(), tmp_path / "update_00000001")
    torch.save(content, folder / MODEL)
    with pytest.raises(UserError, match="update_00000001: DeepSpeed cannot load it"):
        load(engine(), folder)


def test_a_damaged_file_and_none(engine: Engine, tmp_path: Path) -> None:
    folder = written(engine(), tmp_path / "update_00000001")
    whole = (folder / MODEL).read_bytes()
    for content in (bytes(len(whole)), whole[:100], b""):
        (folder / MODEL).write_bytes(content)
        with pytest.raises(UserError, match=f"{MODEL} is damaged"):
            load(engine(), folder)
    (folder / MODEL).unlink()
    with pytest.raises(UserError, match="update_00000001: DeepSpeed"):
        load(engine(), folder)


def test_what_the_marker_does_not_list_is_not_read(engine: Engine, tmp_path: Path) -> None:
    """DeepSpeed takes all files that match, and merges them."""
    folder = written(engine(), tmp_path / "update_00000001")
    shutil.copy(folder / MODEL, folder / "deepspeed" / "mp_rank_01_model_states.pt")
    with pytest.raises(UserError, match="mp_rank_01_model_states.pt was put there after the checkpoint was written: remove it"):
        load(engine(), folder)


def test_a_link_out_of_the_checkpoint_is_not_followed(engine: Engine, tmp_path: Path) -> None:
    folder = written(engine(), tmp_path / "update_00000001")
    elsewhere = written(engine(1), tmp_path / "update_00000002") / MODEL
    (folder / MODEL).unlink()
    (folder / MODEL).symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"leads to {elsewhere}, which is no part of it"):
        load(engine(), folder)


def test_the_state_of_a_loss_scale_is_read(engine: Engine, tmp_path: Path) -> None:
    """fp16's, which no CPU trains in."""
    first = engine(zero_optimization={"stage": 1})
    first.optimizer.loss_scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False)
    folder = written(first, tmp_path / "update_00000001")
    other = engine(zero_optimization={"stage": 1})
    load(other, folder)
    assert vars(other.optimizer.loss_scaler) == vars(first.optimizer.loss_scaler)


def test_a_state_that_could_not_be_read_again_is_refused_when_it_is_written(engine: Engine, tmp_path: Path) -> None:
    odd = engine()
    odd.optimizer.param_groups[0]["note"] = Path("x")
    with pytest.raises(UserError, match=r"DeepSpeed's state holds pathlib.*, which would not be read again"):
        save(odd, tmp_path)


def test_checkpoints_that_deepspeed_wrote_itself_are_read(engine: Engine, tmp_path: Path) -> None:
    """As they were before, with a marker of sizes."""
    first = engine(zero_optimization={"stage": 2})
    train(first, 2)
    first.save_checkpoint(str(tmp_path), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    (tmp_path / "complete.json").write_text(str({str(f.relative_to(tmp_path)): f.stat().st_size for f in files}).replace("'", '"'))
    other = engine(1, zero_optimization={"stage": 2})
    load(other, tmp_path)
    assert train(other, 3) == train(first, 3)
