"""Checks DeepSpeed's part of the configuration key by key: DeepSpeed ignores many mistakes, and reports others without the key."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from seppo_fast.configfile import explain_all, nearest, unknown
from seppo_fast.errors import UserError
from seppo_fast.training.engine_state import parted

MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig, "compile": CompileConfig,
    **{name: DeepSpeedMonitorConfig.model_fields[name].annotation for name in ("tensorboard", "wandb", "csv_monitor", "comet")},
}
# Sections that DeepSpeed reads with `.get`: their keys, and the values of those that have few.
PLAIN: dict[str, dict[str, tuple[str, ...]]] = {
    "data_types": {"grad_accum_dtype": ("fp32", "bf16", "fp16")},
    # No float16: its loss scale is in no checkpoint of DeepSpeed's. The fp16 section's is.
    "torch_autocast": {"enabled": (), "dtype": ("bfloat16", "torch.bfloat16"),
                       "lower_precision_safe_modules": ()},
}
# DeepSpeed takes these out of the parameters before it makes the optimizer.
ADAM_CHOICES = {"torch_adam", "adam_w_mode"}


def problems(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with the sections of DeepSpeed's part, one line each, with the key's full path."""
    found = []
    for name, section in raw.items():
        if name not in MODELS.keys() | PLAIN.keys() | {"optimizer", "scheduler"}:
            continue
        if not isinstance(section, Mapping):
            found.append(f'{name}: expected a section, e.g. {{"{EXAMPLES.get(name, "enabled")}": ...}} (got {section!r})')
        elif name in MODELS:
            found += _refused(name, MODELS[name], section)
        elif name in PLAIN:
            found += [unknown(f"{name}.{key}", key, PLAIN[name]) for key in section if key not in PLAIN[name]]
            found += [f"{name}.{key}: expected one of {', '.join(choices)} (got {section[key]!r})"
                      for key, choices in PLAIN[name].items() if choices and key in section and section[key] not in choices]
            found += [f"{name}.enabled: expected true or false (got {section['enabled']!r})"]\
                if section.get("enabled", False) not in (True, False) else []
        elif name == "optimizer":
            found += _optimizer_problems(section)
        else:
            found += _scheduler_problems(section)
    for section, key in (("zero_optimization", "compute_grad_norm"), ("bf16", "check_grad_overflow")):
        if isinstance(raw.get(section), Mapping) and raw[section].get(key) is False:
            found.append(f"{section}.{key}: false would write gradients that are not finite into the weights; leave it out")
    return found + _out_of_reach(raw) + _schedule_of_torch(raw)


def _out_of_reach(raw: Mapping[str, Any]) -> list[str]:
    """Settings of ZeRO with which a checkpoint would not have all of the optimizer's state."""
    zero = raw.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return []
    offloads = {key: zero[key] for key in ("offload_optimizer", "offload_param") if isinstance(zero.get(key), Mapping)}
    found = [f'zero_optimization.{key}.device: checkpoints cannot hold what is swapped to NVMe; take "cpu"'
             for key, section in offloads.items() if section.get("device") == "nvme"]
    optimizer = offloads.get("offload_optimizer", {})
    if optimizer.get("ratio", 1.0) != 1.0:
        found.append(f"zero_optimization.offload_optimizer.ratio: {optimizer['ratio']} makes a second optimizer on the GPU, whose"
                     " state checkpoints do not hold; leave it out")
    if optimizer.get("super_offload"):
        found.append("zero_optimization.offload_optimizer.super_offload: checkpoints cannot hold its state; leave it out")
    if zero.get("zenflow") is not None:
        found.append("zero_optimization.zenflow: checkpoints cannot hold its state; leave it out")
    return found


def _schedule_of_torch(raw: Mapping[str, Any]) -> list[str]:
    """DeepSpeed gives torch's schedules an optimizer of its own, which they take only where it is torch's."""
    name = raw["scheduler"].get("type") if isinstance(raw.get("scheduler"), Mapping) else None
    half = any(isinstance(raw.get(key), Mapping) and raw[key].get("enabled") for key in ("bf16", "fp16"))
    zero = raw.get("zero_optimization")
    if name is None or hasattr(lr_schedules, str(name)) or not (half or isinstance(zero, Mapping) and zero.get("stage")):
        return []
    return [f"scheduler.type: {name} is PyTorch's, which DeepSpeed can use in fp32 at ZeRO stage 0 alone; take one of"
            f" {', '.join(lr_schedules.VALID_LR_SCHEDULES)}"]


EXAMPLES = {"zero_optimization": "stage", "data_types": "grad_accum_dtype", "scheduler": "type", "optimizer": "type"}


def _refused(name: str, model: type[BaseModel], section: Mapping[str, Any]) -> list[str]:
    try:
        model(**section)
    except ValidationError as error:
        return explain_all(error, model, name)
    except (TypeError, ValueError, AssertionError) as error:
        return [f"{name}: {error}"]
    return []


def _optimizer_problems(section: Mapping[str, Any]) -> list[str]:
    name, params = section.get("type"), section.get("params", {})
    torch_names = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    if not isinstance(name, str) or name not in torch_names and name.lower() not in DEEPSPEED_OPTIMIZERS:
        return [_not_one_of("optimizer.type", name, torch_names | set(DEEPSPEED_OPTIMIZERS))]
    own = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(name.lower()) or getattr(torch.optim, name, None)
    if own is None:  # one that is DeepSpeed's alone
        return []
    known = set(inspect.signature(own).parameters) - {"params"}
    if name.lower() in ("adam", "adamw"):
        known |= ADAM_CHOICES
        for fused in (FusedAdam, DeepSpeedCPUAdam):
            known |= set(inspect.signature(fused).parameters) - {"params", "model_params"}
    found = [unknown(f"optimizer.params.{key}", key, known) for key in params if key not in known]
    taken = {key: value for key, value in params.items() if key in inspect.signature(own).parameters}
    return found or _cannot("optimizer.params", lambda: own(_dummy(), **taken)) or _cannot_be_saved(own, taken)


def _cannot_be_saved(kind: type[torch.optim.Optimizer], params: Mapping[str, Any]) -> list[str]:
    """Whether a step works without further arguments, and leaves a state that a checkpoint can hold."""
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.ones(2, 3)
    try:
        optimizer = kind([weight], **{key: value for key, value in params.items() if key != "capturable"})  # that is for GPUs
        optimizer.step()
        parted(optimizer, weight)
    except UserError as error:
        return [str(error)]
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        return [f"optimizer.type: {kind.__name__} cannot make a step here ({error}); choose another optimizer"]
    return []


def _scheduler_problems(section: Mapping[str, Any]) -> list[str]:
    name, params = section.get("type"), section.get("params", {})
    own = getattr(lr_schedules, str(name), None) or getattr(torch.optim.lr_scheduler, str(name), None)
    if not isinstance(own, type):
        schedules = {*lr_schedules.VALID_LR_SCHEDULES, *torch.optim.lr_scheduler.__all__}
        return [_not_one_of("scheduler.type", name, schedules)]
    if not isinstance(params, Mapping):
        return [f"scheduler.params: expected a section (got {params!r})"]
    known = set(inspect.signature(own).parameters) - {"optimizer"}
    found = [unknown(f"scheduler.params.{key}", key, known) for key in params if key not in known]
    return found or _cannot("scheduler.params", lambda: own(torch.optim.AdamW(_dummy(), lr=1.0), **params))


def _not_one_of(path: str, name: Any, options: set[str]) -> str:
    near = nearest(str(name), options)
    return f"{path}: neither DeepSpeed nor torch has {name!r}" + (f"; did you mean {near}?" if near else "")


def _cannot(path: str, make: Any) -> list[str]:
    try:
        make()
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        return [f"{path}: {error}"]
    return []


def _dummy() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(1))]
