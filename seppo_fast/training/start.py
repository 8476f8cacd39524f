"""Begins a run with the policy of a checkpoint or of a pool, in place of the base model (seppo.model.start_from)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from seppo_fast.checksums import checksum
from seppo_fast.config import Model as Settings
from seppo_fast.errors import UserError, few
from seppo_fast.models import Model
from seppo_fast.models.files import check_tensors
from seppo_fast.models.finite import check_finite
from seppo_fast.models.lora import choose_trained, trainable_weights
from seppo_fast.opening import named_file
from seppo_fast.training import checkpoint
from seppo_fast.training.checkpoint import POLICY
from seppo_fast.training.marker import listed, missing

KEY = "seppo.model.start_from"


def find(given: str) -> Path:
    """The policy's file that the key names, itself or by a complete checkpoint's folder."""
    advice = f"give a checkpoint's folder, its {POLICY}, or a past policy's file in a run's pool folder"
    file = named_file(given, POLICY, KEY, advice)
    if file.name == POLICY and (lack := missing(file.parent)):
        raise UserError(f"{KEY} {given}: the checkpoint is not complete ({lack}); give an earlier one, or a policy from the pool")
    check_tensors(file)
    return file


def read(given: str, model: Model, settings: Settings, seed: int) -> tuple[dict[str, Tensor], str]:
    """The policy's weights by name, checked against the model's, and the file with its checksum, for messages."""
    file = find(given)
    try:
        digest = checksum(file)
        if digest != (written_as(file) or digest):
            raise UserError(f"{KEY} {given}: {file} is damaged: its checksum is not the one of what was written; give another"
                            " checkpoint or past policy")
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{KEY} {given}: {file} cannot be read ({error}); give another checkpoint or past policy") from error
    check_fit(file, weights, model, settings, seed)
    check_finite(f"{KEY}: {file}", weights.items(), "That policy is lost: give an earlier checkpoint or past policy.")
    return weights, f"{given} (XXH3 {digest})"


def check_fit(file: Path, weights: dict[str, Tensor], model: Model, settings: Settings, seed: int) -> None:
    """Refuse a policy whose weights are not those that this run trains."""
    with torch.device("meta"):
        denoiser = model.empty_denoiser()
        choose_trained(denoiser, settings.lora, seed)
    needed = {name: tuple(weight.shape) for name, weight in trainable_weights(denoiser).items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for problem, names in (("lacks", needed.keys() - found.keys()), ("has beside them", found.keys() - needed.keys()),
                           ("has in another shape", {name for name in needed if found.get(name, needed[name]) != needed[name]})):
        if names:
            raise UserError(f"{KEY}: {file} is the policy of another model or another seppo.model.lora; of the weights that are"
                            f" trained here it {problem} {few(names)}. Set seppo.model as it was for that policy")
    then = trained_as(file)
    if settings.lora and then and then.get("alpha", 16.0) != settings.lora.alpha:
        raise UserError(f"{KEY}: {file} was trained with seppo.model.lora.alpha {then.get('alpha', 16.0):g}, and means something"
                        f" else with {settings.lora.alpha:g}; set it as it was")


def written_as(file: Path) -> str | None:
    """The recorded checksum of a policy's file: in its checkpoint's marker, or in the newest checkpoint of the pool's run."""
    try:
        if file.name == POLICY:
            return listed(file.parent)[POLICY].xxh3_128
        checkpoints = checkpoint.complete(file.parent.parent / "checkpoints")
        return checkpoint.read_state(checkpoints[-1]).pool.get(file.name) if checkpoints else None
    except (UserError, ValueError, KeyError):
        return None


def trained_as(file: Path) -> dict[str, Any]:
    """The seppo.model.lora that a policy was trained with, read from the files around it; empty if these do not say."""
    state, config = file.parent / "state.json", file.parent.parent / "config.json"
    try:
        raw = json.loads(state.read_bytes())["config"] if state.is_file() else json.loads(config.read_bytes())
        lora = raw["seppo"]["model"]["lora"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return lora if isinstance(lora, dict) else {}


@torch.no_grad()
def put_into(policy: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy the weights over the policy's own, in its dtype."""
    for name, weight in trainable_weights(policy).items():
        weight.copy_(weights[name])
