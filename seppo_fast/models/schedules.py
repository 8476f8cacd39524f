"""Which noise process a scheduler's configuration stands for, and the flows that can be trained."""

import math
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin

from seppo_fast.errors import UserError, reason
from seppo_fast.models.directory import Directory
from seppo_fast.models.values import ADVICE, check_values

FLOW = "FlowMatchEulerDiscreteScheduler"
# What a scheduler would do otherwise than training and the sampler's tables: its value must be absent or false.
NOT_READ = ("invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is one of flow matching."""
    return (config.get("_class_name") == FLOW or config.get("prediction_type") == "flow_prediction"
            or bool(config.get("use_flow_sigmas")))


def static_shift(config: Mapping[str, Any]) -> float:
    """The k of s' = k s / (1 + (k - 1) s) in a flow's configuration, of whichever scheduler it is."""
    return float(config.get("shift", 1.0) if config.get("_class_name", FLOW) == FLOW else config.get("flow_shift", 1.0))


def check_flow(directory: Directory) -> None:
    """Refuse schedules of a flow family's pipeline that are no flow, or one that training or the sampler would read otherwise."""
    config, file = directory.configs["scheduler"], directory.path / "scheduler" / "scheduler_config.json"
    value = directory.index.get("scheduler")
    name = (value[1] if isinstance(value, list) else None) or config.get("_class_name", FLOW)
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise UserError(f"{file}: diffusers {diffusers.__version__} has no scheduler {name}, so its times are not known; name"
                        f" {FLOW} there and in model_index.json.")
    check_values(file, config, kind)
    check_values(file, config, FlowMatchEulerDiscreteScheduler)
    if name != FLOW and not (config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")):
        raise UserError(f"{file}: {name} follows no flow (prediction_type is {config.get('prediction_type')!r}, use_flow_sigmas"
                        f" {config.get('use_flow_sigmas')!r}), and this family is trained by flow matching. {ADVICE}.")
    for key in NOT_READ:
        if config.get(key):
            raise UserError(f"{file}: {key} is set, which neither training nor the sampler follows; remove it.")
    if not (math.isfinite(static_shift(config)) and static_shift(config) > 0):
        raise UserError(f"{file}: its shift is {static_shift(config):g}, and must be above 0. {ADVICE}.")
    try:
        kind.from_config(config)
    except Exception as error:  # the configuration is the only input
        raise UserError(f"{file}: {name} cannot be made of it: {reason(error)}") from error
