"""What must not change the result: micro-batches, sampling batches, ranks, ZeRO stages. And update 1, where policy == reference."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator
from outcomes import Weights, apart, column, rows, unet_of, weights
from safetensors.torch import load_file

Trained = Callable[..., Path]

# eps: where a gradient is nothing but rounding, Adam would divide it by itself and make a whole step of it.
STEADY = {"optimizer.params.eps": 1e-5, "seppo.beta": 300.0}
OFFLOAD = {"device": "cpu"}
FP32 = {
    "zero 0": {},
    "zero 1": {"zero_optimization": {"stage": 1}},
    "zero 2": {"zero_optimization": {"stage": 2}},
    "zero 3": {"zero_optimization": {"stage": 3}},
    "zero 2 offload": {"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD}},
    "zero 3 offload": {"zero_optimization": {"stage": 3, "offload_optimizer": OFFLOAD}},
}
BF16 = {"bf16 " + name: {"bf16": {"enabled": True}, **FP32[name]} for name in ("zero 0", "zero 2", "zero 3")}
AUTOCAST = {"autocast zero 2": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, **FP32["zero 2"]}}
EVERY = FP32 | BF16 | AUTOCAST | {"lora zero 3": {"seppo.model.lora": {"rank": 2, "alpha": 4.0}, **FP32["zero 3"]},
                                  "sft zero 2": {"seppo.method": "sft", **FP32["zero 2"]},
                                  "draws zero 3": {"seppo.aaf_draws": 4, **FP32["zero 3"]}}


@pytest.fixture
def on_two_ranks(settings: Callable[..., dict[str, Any]], train_on_ranks: Callable[..., list[Path]], finished: dict[str, Path],
                 tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by name of EVERY, all made in one launch."""
    if "zero 0" not in finished:
        folder = tmp_path_factory.mktemp("two-ranks")
        reference = {name: {} if "sft" in name else {"seppo.reference": "latest"} for name in EVERY}
        raws = [settings(**STEADY, zero_force_ds_cpu_optimizer=False, **changes, **reference[name],
                         **{"seppo.output_dir": str(folder / name.replace(" ", "-"))}) for name, changes in EVERY.items()]
        finished.update(zip(EVERY, train_on_ranks(raws), strict=True))
    return {name: finished[name] for name in EVERY}


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_micro_batches_change_nothing(micro: int, trained: Trained) -> None:
    assert apart(weights(trained(**STEADY)), weights(trained(**STEADY, train_micro_batch_size_per_gpu=micro))) < 2e-6
    same_metrics(trained(**STEADY), trained(**STEADY, train_micro_batch_size_per_gpu=micro))


@pytest.mark.parametrize("size", [1, 3])
def test_sampling_batches_change_nothing(size: int, trained: Trained) -> None:
    assert apart(weights(trained(**STEADY)), weights(trained(**STEADY, **{"seppo.sampler.batch_size": size}))) < 2e-6


def test_number_of_ranks_changes_nothing(trained: Trained, on_two_ranks: dict[str, Path]) -> None:
    one, two = trained(**STEADY, **{"seppo.reference": "latest"}), on_two_ranks["zero 0"]
    assert apart(weights(one), weights(two)) < 2e-6
    same_metrics(one, two)


@pytest.mark.parametrize("name", [name for name in FP32 if name != "zero 0"])
def test_zero_stages_change_nothing(name: str, on_two_ranks: dict[str, Path]) -> None:
    assert apart(weights(on_two_ranks["zero 0"]), weights(on_two_ranks[name])) < 2e-6
    same_metrics(on_two_ranks["zero 0"], on_two_ranks[name])


def test_sft_and_lora_on_ranks(trained: Trained, on_two_ranks: dict[str, Path]) -> None:
    sft = trained(**STEADY, **{"seppo.method": "sft"})
    assert apart(weights(sft), weights(on_two_ranks["sft zero 2"])) < 2e-6
    lora = trained(**STEADY, **{"seppo.model.lora": {"rank": 2, "alpha": 4.0}, "seppo.reference": "latest"})
    assert apart(weights(lora), weights(on_two_ranks["lora zero 3"])) < 2e-6


def test_the_noises_of_a_sign_on_ranks(trained: Trained, on_two_ranks: dict[str, Path]) -> None:
    changes = {"seppo.reference": "latest", "seppo.aaf_draws": 4}
    one, two = trained(**STEADY, **changes, train_micro_batch_size_per_gpu=1), on_two_ranks["draws zero 3"]
    assert apart(weights(one), weights(two)) < 2e-6
    same_metrics(one, two)
    assert column(one, "aaf_rate") != column(trained(**STEADY, **{"seppo.reference": "latest"}), "aaf_rate")


@pytest.mark.parametrize("name", [*BF16, *AUTOCAST])
def test_half_precision_trains_alike(name: str, on_two_ranks: dict[str, Path], sd: Path) -> None:
    """bf16 keeps 8 bits: the same run within that, whatever the stage."""
    full, half = weights(on_two_ranks["zero 0"]), weights(on_two_ranks[name])
    kinds = {str(value.dtype) for value in half.values()}
    assert kinds == ({"torch.bfloat16"} if name.startswith("bf16") else {"torch.float32"})
    assert apart(full, unet_of(sd)) > 1e-3
    alike(full, half, 8e-3)
    for one, other in zip(rows(on_two_ranks["zero 0"]), rows(on_two_ranks[name]), strict=True):
        for column_name in ("model_mse_winner", "model_mse_loser", "ref_mse_winner", "ref_mse_loser"):
            assert one[column_name] == pytest.approx(other[column_name], rel=0.03), column_name
    assert column(on_two_ranks[name], "skipped_steps")[-1] == 0


@pytest.mark.parametrize("name", [name for name in EVERY if "sft" not in name])
def test_logit_is_zero_while_policy_is_reference(name: str, on_two_ranks: dict[str, Path]) -> None:
    """In the first update, and in the first one after the policy joined the pool and was picked (`latest`)."""
    for row in (rows(on_two_ranks[name])[index] for index in (0, 2)):
        is_tie(row)
    for row in (rows(on_two_ranks[name])[index] for index in (1, 3)):
        assert row["logit_p05"] < row["logit_p95"]


MODES = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
         "checkpointing": {"seppo.model.gradient_checkpointing": True, "bf16": {"enabled": True}},
         "v": {"seppo.noise": "shared"}, "bf16 in an fp32 pool": {"bf16": {"enabled": True}, "seppo.pool.dtype": "fp32"}}


@pytest.mark.parametrize("mode", MODES)
def test_logit_is_zero_in_every_precision(mode: str, trained: Trained) -> None:
    for row in (rows(trained(**{"seppo.reference": "latest", **MODES[mode]}))[index] for index in (0, 2)):
        is_tie(row)


@pytest.mark.skipif(not get_accelerator().is_fp16_supported(), reason="DeepSpeed says that this machine cannot compute in fp16")
def test_fp16_trains(trained: Trained, sd: Path) -> None:
    """The same run as in fp32 within fp16's 11 bits; and a loss scale that is too large is lowered, which is no failure."""
    small = {"seppo.iterations": 1, "train_batch_size": 4}  # fp16 convolutions are slow on a CPU
    full = trained(**STEADY, **small)
    run = trained(**STEADY, **small, **{"fp16": {"enabled": True, "initial_scale_power": 8}})
    is_tie(rows(run)[0])
    model = weights(run)
    assert {str(value.dtype) for value in model.values()} == {"torch.float16"}
    assert column(run, "skipped_steps") == [0, 0]
    alike(weights(full), model, 2e-3)
    assert column(run, "grad_norm") == pytest.approx(column(full, "grad_norm"), rel=0.1)  # the scale is taken out again
    pooled = load_file(run / "pool" / "policy_00001.safetensors")  # in fp32, which holds every fp16 value
    assert {str(value.dtype) for value in pooled.values()} == {"torch.float32"}
    assert all((pooled[name].half() == model[name]).all() for name in model)

    too_large = trained(**small, **{"fp16": {"enabled": True, "initial_scale_power": 24}, "seppo.max_nonfinite": 1})
    assert column(too_large, "skipped_steps") == [1, 2]
    assert apart(weights(too_large), unet_of(sd)) < 1e-3  # fp16's rounding of the weights


def is_tie(row: dict[str, Any]) -> None:
    """Equal predictions: every logit exactly 0, every sign -1, the loss log 2."""
    assert (row["logit_p05"], row["logit_p50"], row["logit_p95"]) == (0, 0, 0)
    assert (row["aaf_rate"], row["implicit_acc"]) == (1, 0)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert row["model_mse_winner"] == row["ref_mse_winner"] and row["model_mse_loser"] == row["ref_mse_loser"]


def alike(one: Weights, other: Weights, tolerance: float) -> None:
    """The distance between two models as vectors, relative to their length. An update moves this one by 8e-3, four by 3e-2."""
    distance = sum((one[name].float() - other[name].float()).square().sum().item() for name in one) ** 0.5
    assert distance < tolerance * sum(value.float().square().sum().item() for value in one.values()) ** 0.5


def same_metrics(one: Path, other: Path) -> None:
    """Equal rows but for what depends on the clock: they are means over all micro-batches and ranks."""
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if not name.startswith(("seconds", "pairs_per_s", "peak")):
                assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), (name, json.dumps(mine), json.dumps(theirs))
