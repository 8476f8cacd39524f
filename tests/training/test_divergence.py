"""A learning rate that destroys the policy: the newest checkpoint from before is kept, named, and can be begun anew from."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import column, identical, unet_of
from safetensors.torch import load_file, save_file

from seppo_fast.config import Lora, Model
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.lora import choose_trained, trainable_weights
from seppo_fast.training import checkpoint, start
from seppo_fast.training.checkpoint import State
from seppo_fast.training.divergence import largest_in_range


def watched(errors: list[float]) -> State:
    """A state after updates with these errors on the winners."""
    state = State("run", 1, None, {})
    for error in errors:
        state.update += 1
        state.watch(error)
    return state


@pytest.mark.parametrize("spread", [0.05, 0.4, 1.2])
def test_healthy_errors_stay_in_range(spread: float) -> None:
    """Windows of many pairs, of few and of one, with a slow rise to twice the error."""
    generator = torch.Generator().manual_seed(0)
    rise = torch.linspace(0, math.log(2), 500)
    state = watched((0.1 * (spread * torch.randn(500, generator=generator) + rise).exp()).tolist())
    assert state.sound == 499 and not state.diverged


@pytest.mark.parametrize("lost", [5.0, 1e30, math.inf, math.nan])
def test_a_destroyed_policy_is_out_of_range_for_good(lost: float) -> None:
    state = watched([0.1, 0.12, 0.09, 0.11, 0.1, 0.13, 0.1, 0.09, 0.1, *[lost] * 200])
    assert state.sound == 8 and state.diverged, "the tenth error is that of the policy after nine updates"
    assert largest_in_range(state.errors) == pytest.approx(0.4, rel=0.3)
    state.update += 1
    assert state.watch(0.1) and not state.diverged and state.sound == 209


def test_the_checkpoint_from_before_stays_and_a_run_begins_from_it(
        settings: Callable[..., dict[str, Any]], train: Callable[..., Path], tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    """Three updates at 1e-4, then 2."""
    steps = {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 3, "lr_range_test_step_rate": 2e4,
             "lr_range_test_staircase": True}
    raw = settings(**{"scheduler": {"type": "LRRangeTest", "params": steps}, "seppo.method": "sft", "seppo.iterations": 7,
                      "seppo.updates_per_iteration": 1, "seppo.checkpoint.keep_last": 1})
    run = train(raw)
    errors, good = column(run, "model_mse_winner"), run / "checkpoints" / "update_00000003"
    assert max(errors[:4]) < 2 and errors[4] > 8, "the fourth update is the first at the high rate"
    assert [path.name for path in checkpoint.complete(run / "checkpoints")] == [good.name, "update_00000007"]
    said = capsys.readouterr().out
    assert said.count("left its range") == 1 and f"The newest checkpoint from before: {good}\n" in said
    assert f"seppo.model.start_from={good} " in said and f"{run / 'final'} may be of a policy that training destroyed" in said

    again = {"seppo.output_dir": str(tmp_path / "again"), "seppo.iterations": 1}
    raw = settings(**again)
    with pytest.raises(UserError, match=f"--set seppo.model.start_from={good} seppo.output_dir=ANOTHER_FOLDER"):
        train(raw | {"seppo": raw["seppo"] | {"output_dir": str(run)}}, resume=str(good))
    run = train(settings(**again, **{"seppo.model.start_from": str(good)}))
    assert identical(load_file(run / "pool" / "policy_00000.safetensors"), load_file(good / "policy.safetensors"))
    copy = Path(shutil.copytree(good, tmp_path / "copy"))
    policy = bytearray((copy / "policy.safetensors").read_bytes())
    policy[-1] ^= 1
    (copy / "policy.safetensors").write_bytes(policy)
    with pytest.raises(UserError, match=f"seppo.model.start_from {copy}: .* is damaged"):
        train(settings(**again | {"seppo.output_dir": str(tmp_path / "damaged"), "seppo.model.start_from": str(copy)}))
    assert f"Training began with the policy of `{good} (XXH3 " in (run / "final" / "README.md").read_text()


def test_what_a_run_cannot_begin_from(sd: Path, tmp_path: Path) -> None:
    model, settings, folder = open_model(str(sd)), Model(path=str(sd)), tmp_path / "run" / "checkpoints" / "update_00000001"
    folder.mkdir(parents=True)
    unet, pooled = unet_of(sd), tmp_path / "policy_00001.safetensors"

    def refused(path: Path, words: str, settings: Model = settings) -> None:
        with pytest.raises(UserError, match=words):
            start.read(str(path), model, settings, 0)

    save_file(unet, pooled)
    weights, told = start.read(str(pooled), model, settings, 0)
    assert identical(weights, unet) and told.startswith(f"{pooled} (XXH3 ")
    refused(tmp_path / "nothing", "there is no such file")
    refused(tmp_path, "the folder has no policy.safetensors")
    refused(pooled, "of the weights that are trained here it lacks .*lora_A", Model(path=str(sd), lora=Lora(rank=2)))
    save_file(unet, folder / "policy.safetensors")
    refused(folder, "the checkpoint is not complete .*complete.json")
    save_file(unet | {"conv_in.bias": unet["conv_in.bias"] * torch.nan}, pooled)
    refused(pooled, "not finite .*: conv_in.bias")
    save_file(unet | {"conv_in.bias": torch.zeros(3)}, pooled)
    refused(pooled, "another shape conv_in.bias")
    pooled.write_bytes(pooled.read_bytes()[:-5])
    refused(pooled, "announces")


def test_a_lora_of_another_alpha(sd: Path, tmp_path: Path) -> None:
    """Shapes do not tell it; the files around the policy do."""
    model, lora = open_model(str(sd)), Lora(rank=2, alpha=4.0)
    with torch.device("meta"):
        unet = model.empty_denoiser()
        choose_trained(unet, lora, 0)
    file = tmp_path / "pool" / "policy_00001.safetensors"
    file.parent.mkdir()
    save_file({name: torch.zeros(weight.shape) for name, weight in trainable_weights(unet).items()}, file)
    (tmp_path / "config.json").write_text(json.dumps({"seppo": {"model": {"lora": {"rank": 2, "alpha": 8.0}}}}))
    with pytest.raises(UserError, match="lora.alpha 8, and means something else with 4"):
        start.read(str(file), model, Model(path=str(sd), lora=lora), 0)
    (tmp_path / "config.json").unlink()
    start.read(str(file), model, Model(path=str(sd), lora=lora), 0)
