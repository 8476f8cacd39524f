"""The policy inside DeepSpeed: start it, step it, read its weights."""

import copy
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn

from seppo_fast.configfile import Batch, Config
from seppo_fast.errors import UserError
from seppo_fast.extras import need
from seppo_fast.models.lora import trainable_weights
from seppo_fast.models.pix2pix import sees_image
from seppo_fast.models.quantize import is_quantized, lacking, without_quantized
from seppo_fast.training.deepspeed_check import problems
from seppo_fast.training.zero_linear import linear_of, restore_linear

FILES_OF_MONITORS = {"tensorboard", "csv_monitor"}
PACKAGES_OF_MONITORS = {"tensorboard": ("tensorboard", "seppo-fast[monitor]"), "wandb": ("wandb", "seppo-fast[monitor]"),
                        "comet": ("comet_ml", "comet_ml>=3.41")}  # and what installs them
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision(NamedTuple):
    """`dtype` of the weights of policy and reference, and of the autocast both run under, if any."""

    dtype: torch.dtype
    autocast: torch.dtype | None


def precision(deepspeed_config: Mapping[str, Any]) -> Precision:
    """The precision mode that DeepSpeed's bf16, fp16 or torch_autocast section asks for; fp32 without any."""
    for key, dtype in HALF.items():
        if deepspeed_config.get(key, {}).get("enabled"):
            return Precision(dtype, None)
    autocast = deepspeed_config.get("torch_autocast", {})
    if autocast.get("enabled"):
        return Precision(torch.float32, getattr(torch, str(autocast.get("dtype", "bfloat16")).removeprefix("torch.")))
    return Precision(torch.float32, None)


def zero_stage(deepspeed_config: Mapping[str, Any]) -> int:
    """DeepSpeed's ZeRO stage."""
    return int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))


def pool_dtype(config: Config) -> torch.dtype:
    """The dtype in which past policies are kept: as configured, or the policy's own (fp32 when that is fp16)."""
    own = precision(config.deepspeed).dtype
    auto = torch.bfloat16 if own == torch.bfloat16 else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": auto}[config.seppo.pool.dtype]


def engine_config(config: Config, batch: Batch) -> dict[str, Any]:
    """DeepSpeed's dictionary with all three batch keys filled in."""
    filled = copy.deepcopy(dict(config.deepspeed))
    filled.update(train_batch_size=batch.size, train_micro_batch_size_per_gpu=batch.micro,
                  gradient_accumulation_steps=batch.accumulation)
    filled.setdefault("steps_per_print", 2**31)
    folder = Path(config.seppo.output_dir)
    for key in FILES_OF_MONITORS & filled.keys():  # by default DeepSpeed writes where it was started, for all runs alike
        section = filled[key]
        if not section.get("output_path"):
            filled[key] = {"job_name": key, **section, "output_path": str(folder)}
        elif not section.get("job_name"):
            filled[key] = {**section, "job_name": folder.name}
    zero = filled.get("zero_optimization", {})
    if precision(filled).dtype != torch.float32 and zero.get("stage", 0) == 0:
        # At stage 0 in half precision DeepSpeed (0.19) begins with an optimizer step on zero gradients, which shrinks the
        # first real one by a quarter, and unscales fp16's gradients without having scaled the loss. Stage 1 is the same
        # arithmetic done right.
        filled["zero_optimization"] = {**zero, "stage": 1}
        filled.setdefault("zero_allow_untested_optimizer", True)
    return filled


def check_engine_config(config: Config, batch: Batch) -> None:
    """Have DeepSpeed read its part before any model loads; what it refuses becomes a `UserError`. And what needs the batch."""
    samples = config.seppo.sampler.samples_per_iteration
    if samples is not None and samples < batch.size:
        raise UserError(f"seppo.sampler.samples_per_iteration={samples}: it must be at least the {batch.size} pairs of an update")
    found = problems(config.deepspeed)
    if found:
        raise UserError("DeepSpeed's part of the configuration has problems:\n  " + "\n  ".join(found))
    if config.seppo.model.compile == "full" and zero_stage(config.deepspeed) == 3:
        raise UserError("seppo.model.compile: \"full\" does not go with zero_optimization.stage 3, which gathers the weights of one"
                        " layer after another while the network runs; take stage 1 or 2, or \"none\"")
    if config.seppo.model.quantize and zero_stage(config.deepspeed) == 3:
        raise UserError(f"seppo.model.quantize: {config.seppo.model.quantize!r} does not go with zero_optimization.stage 3, which"
                        " would cut the quantized weights into pieces; take stage 1 or 2, which leave frozen weights whole")
    zero = config.deepspeed.get("zero_optimization", {})
    if config.seppo.model.quantize_text in ("int8", "fp8") and zero.get("stage") == 3 and zero.get("memory_efficient_linear", True):
        raise UserError("seppo.model.quantize_text: ZeRO-3 replaces PyTorch's linear layers by its own, which cannot read torchao's"
                        ' weights; set zero_optimization.memory_efficient_linear to false, or take "nf4"')
    checked = engine_config(config, batch)
    del checked["train_batch_size"]  # a dry run has not joined the other ranks, and DeepSpeed would multiply by one
    try:
        deepspeed.DeepSpeedConfig(checked)
    except Exception as error:  # DeepSpeed raises pydantic's, its own and assertion errors here
        raise UserError(f"DeepSpeed does not accept its part of the configuration: {error}") from None


def unsupported(config: Config) -> str | None:
    """Why this machine cannot train as configured, in this precision and with these monitors; None where it can."""
    accelerator, dtype = get_accelerator(), precision(config.deepspeed).dtype
    if dtype == torch.float16 and not accelerator.is_fp16_supported():
        return f"fp16.enabled: DeepSpeed cannot train in fp16 on this {accelerator.device_name()}; enable bf16, or neither"
    if dtype == torch.bfloat16 and not accelerator.is_bf16_supported():
        return f"bf16.enabled: this {accelerator.device_name()} cannot compute in bf16; enable fp16, or neither"
    for key, kind, given in (("quantize", config.seppo.model.quantize, dtype),
                             ("quantize_text", config.seppo.model.quantize_text, torch.float32)):
        with linear_of({}):
            why = lacking(kind, torch.device(accelerator.current_device_name()), given) if kind else None
        if why:
            return f"seppo.model.{key}: {why}"
    for section, (package, install) in PACKAGES_OF_MONITORS.items():
        if config.deepspeed.get(section, {}).get("enabled"):
            try:
                need(package, f"{section}.enabled", install)
            except UserError as error:
                return str(error)
    return None


def start_engine(policy: nn.Module, config: Config, batch: Batch) -> DeepSpeedEngine:
    """Put the policy, and nothing else, into a DeepSpeed engine.

    What the model's pipeline keeps in fp32 beside half precision (Wan's embedding of the time) stays so where it is frozen:
    DeepSpeed would round it. ZeRO-3 partitions it in half precision.
    """
    weights = list(trainable_weights(policy).values())
    exact = {parameter: parameter.data for parameter in policy.parameters()
             if not parameter.requires_grad and parameter.dtype == torch.float32 and not is_quantized(parameter)}
    restore_linear()
    with wandb_below(config.seppo.output_dir), without_quantized(policy):
        engine, *_ = deepspeed.initialize(model=policy, model_parameters=weights, config=engine_config(config, batch))
    if not engine.zero_optimization_partition_weights():
        for parameter, data in exact.items():
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False  # such updates are skipped and counted; too many end the run with a message
    return engine


@contextmanager
def wandb_below(folder: str) -> Iterator[None]:
    """W&B's files go below the run's folder, unless the environment says where; DeepSpeed has no key for it."""
    ours = "WANDB_DIR" not in os.environ
    if ours:
        os.environ["WANDB_DIR"] = folder
    try:
        yield
    finally:
        if ours:
            os.environ.pop("WANDB_DIR", None)


class Step(NamedTuple):
    """What an optimizer step did. `skipped`: gradients were not finite and the policy is as before."""

    grad_norm: float
    lr: float
    skipped: bool
    harmless: bool  # skipped while fp16's dynamic loss scale can still be lowered, as is normal


def upstream_gradient(engine: DeepSpeedEngine) -> float:
    """The gradient that `engine.backward` hands to the loss; known before, so that the kernel writes the final gradient."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return (1.0 if scaler is None else float(scaler.loss_scale)) / engine.gradient_accumulation_steps()


def step(engine: DeepSpeedEngine) -> Step | None:
    """Finish a micro-batch; at the end of the accumulation window, update the policy and say how it went."""
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    lr = engine.get_lr()[0]  # the step itself moves the schedule on
    if hasattr(engine.optimizer, "overflow"):
        scale_before = getattr(engine.optimizer, "cur_scale", None) or getattr(engine.optimizer, "loss_scale", None) or 1.0
        engine.step()
        skipped = not engine.was_step_applied()
        norm = engine.get_global_grad_norm()
        room = scale_before > getattr(getattr(engine.optimizer, "loss_scaler", None), "min_scale", 1.0)
        harmless = skipped and engine.fp16_enabled() and engine.dynamic_loss_scale() and room
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


def image_weight_norm(engine: DeepSpeedEngine) -> dict[str, float]:
    """The norm of the weights by which the network sees its image, as a metric; none of a network that sees none. Every rank calls.

    It begins at zero; near zero the improvement model ignores its image.
    """
    if not sees_image(engine.module):
        return {}
    weight = next(weight for name, weight in trainable_weights(engine.module).items() if name.endswith("conv_in.weight"))
    with GatheredParameters([weight], enabled=engine.zero_optimization_partition_weights()):
        return {"image_weight_norm": float(weight[:, weight.shape[1] // 2:].detach().float().norm())}


def policy_weights(engine: DeepSpeedEngine, keep: bool = True) -> dict[str, Tensor]:
    """CPU copies of the trainable weights by name, where `keep`; every rank must call, because ZeRO-3 gathers them."""
    weights = {}
    for name, weight in trainable_weights(engine.module).items():
        with GatheredParameters([weight], enabled=engine.zero_optimization_partition_weights()):
            if keep:
                weights[name] = weight.detach().to("cpu", copy=True)
    return weights
