"""Which noise process a scheduler's configuration stands for, and the flows that can be trained."""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin

from seppo_fast.errors import UserError, reason
from seppo_fast.models.directory import Directory
from seppo_fast.models.values import ADVICE, check_values

FLOW = "FlowMatchEulerDiscreteScheduler"
# What a scheduler would do otherwise than training and the sampler's tables: its value must be absent or false.
NOT_READ = ("invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
            "use_lu_lambdas")
LEAST_SHIFT, MOST_SHIFT = 1e-3, 1e3


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is one of flow matching."""
    return (config.get("_class_name") == FLOW or config.get("prediction_type") == "flow_prediction"
            or bool(config.get("use_flow_sigmas")))


def static_shift(config: Mapping[str, Any]) -> float:
    """The k of s' = k s / (1 + (k - 1) s) in a flow's configuration, of whichever scheduler it is."""
    return float(config.get("shift", 1.0) if config.get("_class_name", FLOW) == FLOW else config.get("flow_shift", 1.0))


def dynamic_shift(config: Mapping[str, Any], mu: float) -> float:
    """The k of s' = k s / (1 + (k - 1) s) that a dynamic shift by `mu` stands for."""
    return mu if config.get("time_shift_type") == "linear" else math.exp(min(mu, 100.0))


def check_shift(shift: float, file: Path, place: str = "") -> None:
    """Refuse a shift at which all times are 0 or 1."""
    if not LEAST_SHIFT <= shift <= MOST_SHIFT:
        raise UserError(f"{file}: it shifts times by {shift:g}{place}, and the shift must be from {LEAST_SHIFT:g} to"
                        f" {MOST_SHIFT:g}. {ADVICE}.")


def flow_config(directory: Directory) -> dict[str, Any]:
    """The scheduler's configuration, with the class that the pipeline loads as its `_class_name`.

    Refused are schedules that are no flow, or one that training or the sampler would read otherwise than the pipeline.
    """
    config, file = directory.configs["scheduler"], directory.path / "scheduler" / "scheduler_config.json"
    value = directory.index.get("scheduler")
    name = (value[1] if isinstance(value, list) else None) or config.get("_class_name", FLOW)
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise UserError(f"{file}: diffusers {diffusers.__version__} has no scheduler {name}, so its times are not known; name"
                        f" {FLOW} there and in model_index.json.")
    # UniPC declares shift_terminal as true or false, and takes the number
    shared = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
    check_values(file, config, FlowMatchEulerDiscreteScheduler)
    check_values(file, {key: value for key, value in config.items() if key not in shared}, kind)
    if name != FLOW and not (config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")):
        raise UserError(f"{file}: {name} follows no flow (prediction_type is {config.get('prediction_type')!r}, use_flow_sigmas"
                        f" {config.get('use_flow_sigmas')!r}), and this family is trained by flow matching. {ADVICE}.")
    for key in NOT_READ:
        if config.get(key):
            raise UserError(f"{file}: {key} is set, which neither training nor the sampler follows; remove it.")
    config = config | {"_class_name": name}
    check_shift(static_shift(config), file)
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    if config.get("use_dynamic_shifting") and least >= most:
        raise UserError(f"{file}: base_image_seq_len is {least}, and max_image_seq_len {most}, which must be larger. {ADVICE}.")
    if config.get("use_dynamic_shifting") and None in (config.get("base_shift", 0.5), config.get("max_shift", 1.15)):
        raise UserError(f"{file}: base_shift or max_shift is null, and use_dynamic_shifting needs both. {ADVICE}.")
    if not 0 <= (config.get("shift_terminal") or 0) < 1:
        raise UserError(f"{file}: shift_terminal is {config['shift_terminal']:g}, and must be from 0 to below 1. {ADVICE}.")
    try:
        kind.from_config(config)
    except Exception as error:  # the configuration is the only input
        raise UserError(f"{file}: {name} cannot be made of it: {reason(error)}") from error
    return config
