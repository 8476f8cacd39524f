"""Stopped again and again, and gone on with by other numbers of ranks, at other ZeRO stages, with and without offload, a run learns
what one that was never stopped does, within rounding: the same pairs, the same rollouts, drawn once."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forks, Strike
from outcomes import apart, column, identical, rows, weights

from seppo_fast.training import checkpoint

STOP = Strike("seppo_fast.training.trainer:Trainer.report", 1, signal.SIGTERM)  # after one more update
SAMPLING = Strike("seppo_fast.reference.sampler:Sampler.draw", 2, signal.SIGTERM)
OFFLOAD: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_ALL = OFFLOAD | {"offload_param": {"device": "cpu"}}
# Each with the ranks, ZeRO's section and what stops it; the last one goes on to the end.
Stage = tuple[int, dict[str, Any], Strike | None]
CHAINS: dict[str, tuple[dict[str, Any], list[Stage]]] = {
    "full": ({}, [(2, {"stage": 2}, STOP), (1, {}, STOP), (3, {"stage": 3}, STOP), (2, {"stage": 1, **OFFLOAD}, None)]),
    "lora": ({"seppo.model.lora": {"rank": 2, "alpha": 4.0}, "seppo.sampler.window": "iteration",
              "seppo.reference_score": "rollout"},
             [(2, {"stage": 3}, SAMPLING), (3, {"stage": 1}, STOP), (1, {"stage": 3, **OFFLOAD_ALL}, STOP), (3, {}, None)]),
    "bf16": ({"bf16": {"enabled": True}, "seppo.sampler.samples_per_iteration": 14},
             [(2, {"stage": 1}, SAMPLING), (3, {"stage": 2}, STOP), (1, {"stage": 3}, None)]),
}


@pytest.fixture
def of_twelve(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`of_twelve(folder, ranks, zero, **changes)`: 6 updates of 12 pairs, in two or three micro-batches a rank.

    eps: where a gradient is nothing but rounding, Adam would divide it by itself and make a whole step of it.
    """
    return lambda folder, ranks=1, zero=None, **changes: settings(**{
        "seppo.output_dir": str(tmp_path / folder), "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": {1: 4, 2: 3, 3: 2}[ranks],
        "seppo.updates_per_iteration": 3, "seppo.sampler.steps": 2, "seppo.sampler.batch_size": 4, "optimizer.params.eps": 1e-5,
        "seppo.beta": 300.0, **({"zero_optimization": zero} if zero else {}), **changes})


@pytest.mark.parametrize("name", CHAINS)
def test_ranks_and_stages_come_and_go(name: str, of_twelve: Any, train: Callable[..., Path], forks: Forks, tmp_path: Path) -> None:
    changes, stages = CHAINS[name]
    said = []
    for ranks, zero, strike in stages:
        result = forks.run(of_twelve("changing", ranks, zero, **changes), "--resume", "auto", ranks=ranks, strike=strike)
        assert result.statuses == [0] * ranks, result.output[-3000:]
        said += [line for line in result.output.splitlines() if line.startswith("the checkpoint was written by")]
    assert len(said) == len(stages) - 1 and f"going on with {stages[-1][0]} rank" in said[-1]
    run, whole = tmp_path / "changing", train(of_twelve("whole", **changes))
    half = name == "bf16"
    assert apart(weights(run), weights(whole)) < (2e-2 if half else 2e-5)
    assert column(run, "update") == [1, 2, 3, 4, 5, 6]
    # In bf16 the signs of near ties differ between any two numbers of ranks, also of runs that are never stopped: no losses then.
    for mine, other in zip(rows(run), rows(whole), strict=True):
        for key in ("model_mse_winner", "ref_mse_loser") + ("loss", "grad_norm") * (not half):
            assert mine[key] == pytest.approx(other[key], rel=1e-2 if half else 2e-3), key
        assert (mine["lr"], mine["reference"]) == (other["lr"], other["reference"])
    if name != "full":  # rollouts of a whole iteration, found by whoever goes on; the stop may have come after all were drawn
        assert [seconds > 0 for seconds in column(run, "seconds_sampling")][1:] == [False, False, True, False, False]


def test_the_messages_name_what_changed(of_twelve: Any, forks: Forks, tmp_path: Path) -> None:
    first = of_twelve("run", 2, {"stage": 2})
    assert forks.run(first, ranks=2, strike=STOP).statuses == [0, 0]
    other = of_twelve("run", 1, {"stage": 1, **OFFLOAD}) | {"train_batch_size": 8}
    result = forks.run(other, "--resume", "auto")
    assert result.status == 2 and "pairs of an update: 12 there, 8 now" in result.output
    del other["train_batch_size"]
    other["gradient_accumulation_steps"] = 3
    result = forks.run(other, "--resume", "auto")
    assert result.status == 0 and ("the checkpoint was written by 2 ranks at ZeRO stage 2, 2 x 3 pairs each; going on with 1 rank"
                                   " at ZeRO stage 1 with optimizer offloaded, 3 x 4 pairs each\n") in result.output


def test_a_moved_run_of_moved_models_goes_on_and_other_weights_are_refused(
        of_twelve: Any, train: Callable[..., Path], forks: Forks, sd: Path, demonstrations: Path, tmp_path: Path) -> None:
    raw = of_twelve("run", **{"seppo.model.lora": {"rank": 2}, "seppo.checkpoint.every": 1, "seppo.iterations": 1})
    assert forks.run(raw, strike=STOP).status == 0
    whole = weights(train(raw | {"seppo": raw["seppo"] | {"output_dir": str(tmp_path / "whole")}}))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    (moved,) = checkpoint.complete(tmp_path / "moved" / "checkpoints")
    before = json.loads((moved / "state.json").read_text())["stamps"]["seppo.model.path"]
    model, data = (Path(shutil.copytree(folder, tmp_path / folder.name, copy_function=shutil.copyfile))
                   for folder in (sd, demonstrations))
    raw["seppo"] |= {"output_dir": str(tmp_path / "moved"), "model": raw["seppo"]["model"] | {"path": str(model)}}
    raw["seppo"]["data"]["source"] = str(data)
    weight = model / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weight.read_bytes())
    content[-1] ^= 1
    right = weight.read_bytes()
    weight.write_bytes(content)
    result = forks.run(raw, "--resume", "auto")
    assert result.status == 2 and "was trained with other weights than those that seppo.model.path has now" in result.output
    weight.write_bytes(right)
    os.utime(weight, (0, 0))
    assert identical(weights(train(raw, "auto")), whole)
    after = json.loads((checkpoint.complete(moved.parent)[-1] / "state.json").read_text())["stamps"]["seppo.model.path"]
    assert [stamp[1] for stamp in after] == [stamp[1] for stamp in before] and str(model) in after[0][0] and str(sd) in before[0][0]
