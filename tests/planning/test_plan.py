"""The plan's advice, and the facts about DeepSpeed on which it rests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NARROW, tiny_animatediff, tiny_pix2pix, tiny_sd3
from tiny_wan import tiny_wan
from torch import Tensor, nn

import seppo_fast
from seppo_fast.configfile import Config, batch_plan, load_config, parse_config
from seppo_fast.planning.dry_run import dry_run
from seppo_fast.planning.plan import advice
from seppo_fast.training.engine import start_engine

CONFIGS = Path(seppo_fast.__file__).parent / "configs"
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}


def told(config: Config, world: int) -> str:
    return "\n".join(advice(config, batch_plan(config.deepspeed, world), None))


def test_the_shipped_settings_need_no_advice() -> None:
    assert told(load_config("ds_a100.json"), 8) == ""


# in test_command.py, test_dry_run.py, test_transformer_cost.py
DRY_RUN_ELSEWHERE = {"ds_a100", "ds_a100_video", "lora_folder", *(f"ds_a100_{name}" for name in ("sd35", "flux", "qwen", "wan"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({file.stem for file in CONFIGS.glob("*.json")} - DRY_RUN_ELSEWHERE))
def test_the_shipped_configurations_pass_their_dry_run(name: str, sd: Path, tmp_path: Path) -> None:
    """The quickstarts' with models of their kind: theirs are made by the quickstart."""
    overrides = [f"seppo.output_dir={tmp_path / 'run'}", "seppo.data.source=null"]
    if name in ("quickstart", "quickstart_improvement", "quickstart_iterative_dpo"):
        overrides.append(f"seppo.model.path={sd}")
    if name == "quickstart_iterative_dpo":
        overrides.append(f"seppo.improvement.path={tiny_pix2pix(tmp_path / 'improvement', **NARROW)}")
    if name == "quickstart_flow":
        overrides.append(f"seppo.model.path={tiny_sd3(tmp_path / 'base')}")
    if name == "quickstart_video":
        overrides += [f"seppo.model.path={tiny_animatediff(tmp_path / 'base')}", "seppo.data.video.frames=8"]
    if name == "quickstart_video_flow":
        overrides.append(f"seppo.model.path={tiny_wan(tmp_path / 'base')}")
    printed = dry_run(load_config(f"{name}.json", overrides), 1)
    assert "memory a rank" in printed and printed.endswith("dry run: nothing was trained or written")


def test_the_plan_says_how_beta_is_chosen(settings: Callable[..., dict[str, Any]]) -> None:
    for beta, said in (("auto", "auto (2.77 / median |margin|, 2000 at first)"), (250, "250")):
        assert f", beta {said}, noise" in dry_run(parse_config(settings(**{"seppo.beta": beta})), 1)


def test_the_plan_says_how_many_noises_decide_a_sign(settings: Callable[..., dict[str, Any]]) -> None:
    printed = [dry_run(parse_config(settings(**{"seppo.aaf_draws": n})), 1) for n in (1, 4)]
    assert ", signs of 4 noises" in printed[1] and "signs of" not in printed[0]


@pytest.mark.parametrize(("override", "expected"), [
    ("zero_optimization.stage=2", "reduces the gradients between the ranks in each of the 32 micro-batches"),
    ("communication_data_type=null", '"communication_data_type": "fp32"'),
    ("data_types={}", "gradients of 32 micro-batches are summed in bfloat16"),
    ("bf16.immediate_grad_update=false", "bf16.immediate_grad_update true saves that copy"),
    ("optimizer.params.fused=false", "optimizer.params.fused true saves memory"),
])
def test_advice(override: str, expected: str) -> None:
    config = load_config("ds_a100.json", [override])
    assert expected in told(config, 8)
    assert expected not in told(load_config("ds_a100.json", [override, "train_batch_size=1", "train_micro_batch_size_per_gpu=1",
                                                             "zero_optimization.stage=3",
                                                             'zero_optimization.offload_optimizer={"device": "cpu"}']), 1)


def window(settings: Callable[..., dict[str, Any]], **changes: Any) -> tuple[Any, Tensor]:
    """An engine after the backwards of a window of three micro-batches, and its gradient sums."""
    config = parse_config(settings(**BF16 | {"train_batch_size": 3, "train_micro_batch_size_per_gpu": 1} | changes))
    torch.manual_seed(0)
    engine = start_engine(nn.Linear(64, 64).bfloat16(), config, batch_plan(config.deepspeed, 1))
    for seed in range(3):
        torch.manual_seed(seed)
        engine.backward(engine(torch.randn(4, 64, dtype=torch.bfloat16)).float().pow(2).mean())
        if seed < 2:
            engine.step()
    return engine, engine.optimizer.fp32_groups_gradients_flat[0].clone()


def test_sums_are_rounded_unless_they_are_sent_in_fp32(settings: Callable[..., dict[str, Any]], ranks: Any) -> None:
    _, rounded = window(settings)
    engine, exact = window(settings, communication_data_type="fp32")
    assert torch.equal(rounded, rounded.bfloat16().float()) and not torch.equal(exact, exact.bfloat16().float())
    assert torch.equal(exact.bfloat16().float(), rounded)
    assert all(weight.grad is not None for weight in engine.module.parameters())


def test_gradients_taken_at_once_are_the_same(settings: Callable[..., dict[str, Any]], ranks: Any) -> None:
    _, later = window(settings, communication_data_type="fp32")
    engine, at_once = window(settings, communication_data_type="fp32", bf16={"enabled": True, "immediate_grad_update": True})
    assert torch.equal(later, at_once)
    assert all(weight.grad is None for weight in engine.module.parameters())


def test_fused_reaches_the_optimizer(settings: Callable[..., dict[str, Any]], ranks: Any) -> None:
    engine, _ = window(settings, **{"optimizer.params.fused": True})
    assert type(engine.basic_optimizer) is torch.optim.AdamW and engine.basic_optimizer.defaults["fused"] is True
    engine.step()
    assert engine.was_step_applied()


def test_captions_beyond_the_text_encoder_are_in_the_plan(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for number, caption in enumerate(("a cat", "a cat " * 80)):
        source = Path(settings()["seppo"]["data"]["source"])
        copied = tmp_path / str(number)
        copied.mkdir()
        name = next(source.glob("*.png")).name
        (copied / name).write_bytes((source / name).read_bytes())
        (copied / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": caption}) + "\n")
        said = dry_run(parse_config(settings(**{"seppo.data.source": str(copied)})), 1)
        assert ("\n  captions " in said) == bool(number)
    assert "of the first 1 1 is longer than the 77 tokens that the text encoder sees" in said
