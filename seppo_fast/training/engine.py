"""The policy inside DeepSpeed: start it, step it, read its weights."""

import copy
import math
from typing import NamedTuple

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn

from seppo_fast.configfile import Batch, Config
from seppo_fast.errors import UserError
from seppo_fast.models.lora import trainable_weights
from seppo_fast.training.deepspeed_check import problems

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(NamedTuple):
    """`dtype` of the weights of policy and reference, and of the autocast both run under, if any."""

    dtype: torch.dtype
    autocast: torch.dtype | None


def precision(deepspeed_config: dict) -> Precision:
    """The precision mode that DeepSpeed's bf16, fp16 or torch_autocast section asks for; fp32 without any."""
    for key, dtype in HALF.items():
        if deepspeed_config.get(key, {}).get("enabled"):
            return Precision(dtype, None)
    autocast = deepspeed_config.get("torch_autocast", {})
    if autocast.get("enabled"):
        return Precision(torch.float32, getattr(torch, str(autocast.get("dtype", "bfloat16")).removeprefix("torch.")))
    return Precision(torch.float32, None)


def engine_config(config: Config, batch: Batch) -> dict:
    """DeepSpeed's dictionary with all three batch keys filled in."""
    filled = copy.deepcopy(dict(config.deepspeed))
    filled.update(train_batch_size=batch.size, train_micro_batch_size_per_gpu=batch.micro,
                  gradient_accumulation_steps=batch.accumulation)
    filled.setdefault("steps_per_print", 2**31)
    return filled


def check_engine_config(config: Config, batch: Batch) -> None:
    """Have DeepSpeed read its part before any model loads; what it refuses becomes a `UserError`."""
    found = problems(config.deepspeed)
    if found:
        raise UserError("DeepSpeed's part of the configuration has problems:\n  " + "\n  ".join(found))
    try:
        deepspeed.DeepSpeedConfig(engine_config(config, batch))
    except Exception as error:  # DeepSpeed raises pydantic's, its own and assertion errors here
        raise UserError(f"DeepSpeed does not accept its part of the configuration: {error}") from None


def start_engine(policy: nn.Module, config: Config, batch: Batch) -> DeepSpeedEngine:
    """Put the policy, and nothing else, into a DeepSpeed engine."""
    weights = list(trainable_weights(policy).values())
    engine, *_ = deepspeed.initialize(model=policy, model_parameters=weights, config=engine_config(config, batch))
    return engine


class Step(NamedTuple):
    """What an optimizer step did. `skipped`: gradients were not finite and the policy is as before."""

    grad_norm: float
    lr: float
    skipped: bool
    harmless: bool  # skipped by a dynamic loss scale that still has room to fall: fp16's normal search for its scale


def finite_or_nan(loss: Tensor) -> Tensor:
    """The loss, with NaN gradients where it is not finite, so that the one test for gradients covers both."""
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


def step(engine: DeepSpeedEngine) -> Step | None:
    """Finish a micro-batch; at the end of the accumulation window, update the policy and say how it went."""
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    lr = engine.get_lr()[0]  # the step itself moves the schedule on
    if hasattr(engine.optimizer, "overflow"):
        scale_before = getattr(engine.optimizer, "cur_scale", None) or getattr(engine.optimizer, "loss_scale", 1.0)
        engine.step()
        skipped = not engine.was_step_applied()
        norm = engine.get_global_grad_norm()
        harmless = skipped and engine.fp16_enabled() and engine.dynamic_loss_scale() and scale_before > 1.0
        return Step(math.nan if norm is None else float(norm), lr, skipped, harmless)
    # Plain fp32 has no overflow check in DeepSpeed: it would write the NaN into the weights.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        engine.step()
        return Step(norm, lr, skipped=False, harmless=False)
    engine.zero_grad()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.skipped_steps += 1
    return Step(norm, lr, skipped=True, harmless=False)


def policy_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """CPU copies of the trainable weights by name; every rank must call, because ZeRO-3 gathers them."""
    weights = {}
    for name, weight in trainable_weights(engine.module).items():
        with GatheredParameters([weight], enabled=engine.zero_optimization_partition_weights()):
            weights[name] = weight.detach().to("cpu", copy=True)
    return weights
