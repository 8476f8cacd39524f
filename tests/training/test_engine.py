"""What the host knows before backward is what DeepSpeed's backward hands to the loss."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.errors import UserError
from seppo_fast.ops import seppo_loss
from seppo_fast.planning.dry_run import dry_run
from seppo_fast.planning.plan import plan
from seppo_fast.training.engine import precision, start_engine, upstream_gradient

FP16 = pytest.mark.skipif(not get_accelerator().is_fp16_supported(), reason="DeepSpeed says that this CPU cannot compute in fp16")
MODES = {
    "fp32": {},
    "fp32 zero 2": {"zero_optimization": {"stage": 2}},
    "zero 3": {"zero_optimization": {"stage": 3}},
    "bf16": {"bf16": {"enabled": True}},
    "bf16 zero 2": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 1}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 7}},
    "fp16 static": {"fp16": {"enabled": True, "loss_scale": 32.0}, "zero_optimization": {"stage": 2}},
}


@pytest.mark.parametrize("mode", [pytest.param(name, marks=FP16 if "fp16" in name else ()) for name in MODES])
def test_upstream_gradient_is_what_arrives(mode: str, settings: Callable[..., dict[str, Any]], ranks: Any) -> None:
    config = parse_config(settings(train_batch_size=12, train_micro_batch_size_per_gpu=4, **MODES[mode]))
    dtype = precision(config.deepspeed).dtype
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    engine = start_engine(policy, config, batch_plan(config.deepspeed, ranks.world))
    noisy, ref_pred, target = torch.randn(3, 4, 8).to(dtype)
    for _ in range(3):
        known = upstream_gradient(engine)
        arrived: list[torch.Tensor] = []
        model_pred = engine(noisy)
        loss = seppo_loss(model_pred, ref_pred, target, 10.0, grad_scale=known)
        loss.register_hook(arrived.append)
        engine.backward(loss)
        assert arrived[0].item() == pytest.approx(known, rel=1e-6)
        engine.step()
    assert known != 1.0


@pytest.mark.skipif(get_accelerator().is_fp16_supported(), reason="this machine trains in fp16")
def test_fp16_where_there_is_none_is_a_message(settings: Callable[..., dict[str, Any]], train: Callable[..., Any]) -> None:
    raw = settings(fp16={"enabled": True})
    with pytest.raises(UserError, match="fp16.enabled: DeepSpeed cannot train in fp16 on this cpu; enable bf16, or neither"):
        train(raw)
    said = dry_run(parse_config(raw), 1)
    assert "before you train: fp16.enabled: DeepSpeed cannot train" in said, "a plan may be for another machine"


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, "policy and reference in fp32, past policies kept in fp32; VAE"),
    ({"bf16": {"enabled": True}}, "policy and reference in bf16, past policies kept in bf16"),
    ({"bf16": {"enabled": False}}, "policy and reference in fp32"),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "in fp32, run under autocast in bf16, past policies kept in fp32"),
    ({"seppo.method": "sft"}, "  policy in fp32; VAE"),
])
def test_the_plan_states_the_precision(settings: Callable[..., dict[str, Any]], changes: dict[str, Any], expected: str) -> None:
    config = parse_config(settings(**changes))
    assert expected in plan(config, batch_plan(config.deepspeed, 1), None, None, None)


@pytest.mark.parametrize(("section", "package", "install"), [
    ("tensorboard", "tensorboard", "seppo-fast[monitor]"), ("wandb", "wandb", "seppo-fast[monitor]"),
    ("comet", "comet_ml", "comet_ml>=3.41")])
def test_a_monitor_without_its_package_is_a_message(section: str, package: str, install: str, tmp_path: Path,
                                                    settings: Callable[..., dict[str, Any]], train: Callable[..., Any],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is encoded: DeepSpeed finds out when it starts, on rank 0 alone."""
    monkeypatch.setitem(sys.modules, package, None)
    raw = settings(**{section: {"enabled": True}, "seppo.output_dir": str(tmp_path / "run")})
    expected = f"{section}.enabled needs the package {package}, which is not here"
    with pytest.raises(UserError, match=expected) as caught:
        train(raw)
    assert f"pip install '{install}'" in str(caught.value) and not (tmp_path / "run" / "config.json").exists()
    assert f"before you train: {expected}" in dry_run(parse_config(raw), 1)
    assert expected not in dry_run(parse_config(raw | {section: {"enabled": False}}), 1)
