"""Which noise process a scheduler's configuration stands for."""

from collections.abc import Mapping
from typing import Any

from seppo_fast.errors import UserError
from seppo_fast.models.directory import Directory


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is one of flow matching."""
    return (config.get("_class_name") == "FlowMatchEulerDiscreteScheduler" or config.get("prediction_type") == "flow_prediction"
            or bool(config.get("use_flow_sigmas")))


def check_flow(directory: Directory) -> None:
    """Refuse what is no flow."""
    if not is_flow(directory.configs["scheduler"]):
        raise UserError(f"{directory.path / 'scheduler' / 'scheduler_config.json'}: no flow")
