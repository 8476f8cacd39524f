"""Wan in bf16: what its pipeline keeps in fp32 stays so beside a LoRA; policy and reference compute alike; the ZeRO stages."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from outcomes import Weights, column, rows
from safetensors.torch import load_file
from training.test_flow_runs import policy_of

from seppo_fast.training.trainer import Trainer

LORA = {"seppo.model.lora": {"rank": 2, "alpha": 4.0}}
BF16 = {"bf16": {"enabled": True}}


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers of the runs made meanwhile."""
    made: list[Trainer] = []
    loop = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: (made.append(self), loop(self)))
    return made


def dtypes(network: torch.nn.Module) -> dict[str, torch.dtype]:
    """Those of weights and tables, by the names without an adapter."""
    return {name.replace(".base_layer", ""): value.dtype for name, value in network.state_dict().items()}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_lora_in_bf16_keeps_what_the_pipeline_keeps(stage: int, of_wan: Any, wan: Path, train: Callable[..., Path],
                                                      trainers: list[Trainer]) -> None:
    run = train(of_wan(**BF16, **LORA, **{"zero_optimization": {"stage": stage}, "seppo.iterations": 1}))
    plain = dtypes(WanTransformer3DModel.from_pretrained(wan / "transformer", torch_dtype=torch.bfloat16))
    assert set(plain.values()) == {torch.float32, torch.bfloat16}
    policy, reference = dtypes(trainers[0].engine.module), dtypes(trainers[0].reference.module)
    assert {name: policy[name] for name in plain} == plain and policy == reference
    assert {policy[name] for name in policy.keys() - plain.keys()} == {torch.bfloat16}
    frozen = dict(trainers[0].reference.module.named_parameters())
    assert all(weight.data_ptr() == frozen[name].data_ptr() for name, weight in trainers[0].engine.module.named_parameters()
               if not weight.requires_grad)
    first, second = rows(run)
    assert first["logit_p05"] == first["logit_p95"] == 0 and first["model_mse_winner"] == first["ref_mse_winner"]
    assert second["logit_p05"] < second["logit_p95"] and column(run, "skipped_steps") == [0, 0]


def test_all_weights_in_bf16_are_the_references(of_wan: Any, wan: Path, train: Callable[..., Path], trainers: list[Trainer]
                                                ) -> None:
    run = train(of_wan(**BF16, **{"seppo.iterations": 1}))
    policy, reference = dtypes(trainers[0].engine.module), dtypes(trainers[0].reference.module)
    assert policy == reference and set(policy.values()) == {torch.bfloat16}
    first, second = rows(run)
    assert first["logit_p05"] == first["logit_p95"] == 0 and second["logit_p05"] < second["logit_p95"]
    final = WanTransformer3DModel.from_pretrained(run / "final" / "transformer").state_dict()
    assert all(torch.equal(final[name], weight.float()) for name, weight in policy_of(run).items())


def between(one: Weights, other: Weights) -> float:
    """The norm of the difference of two models' weights."""
    return math.sqrt(sum((one[name].double() - other[name].double()).square().sum().item() for name in one))


@pytest.mark.parametrize(("changes", "share"), [({}, 1e-4), (BF16, 0.1), (BF16 | LORA, 0.15)], ids=["fp32", "bf16", "bf16 LoRA"])
def test_zero_3_trains_what_zero_1_trains(changes: dict[str, Any], share: float, of_wan: Any, train_on_ranks: Any, tmp_path: Path
                                          ) -> None:
    """Apart from rounding: ZeRO-3 partitions all weights in half precision."""
    one, three = train_on_ranks([
        of_wan(**changes, **{"zero_optimization": {"stage": stage}, "seppo.output_dir": str(tmp_path / str(stage))})
        for stage in (1, 3)])
    for run in (one, three):
        assert rows(run)[0]["logit_p05"] == rows(run)[0]["logit_p95"] == 0
    trained, start = policy_of(one), load_file(one / "pool" / "policy_00000.safetensors")
    assert 0 < between(trained, policy_of(three)) < share * between(trained, start)
    assert column(one, "loss") == pytest.approx(column(three, "loss"), rel=share)
