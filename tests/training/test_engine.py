"""What the host knows before backward is what DeepSpeed's backward hands to the loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.ops import seppo_loss
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
