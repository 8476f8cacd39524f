"""A trial of a model's configurations: the networks are made without weights and run once on the meta device."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from seppo_fast.errors import UserError, reason
from seppo_fast.models import common
from seppo_fast.models.directory import HERE, Directory
from seppo_fast.models.files import shapes
from seppo_fast.models.pix2pix import IMAGE
from seppo_fast.models.values import ADVICE

TEXT = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
_made: dict[str, dict[str, tuple[int, ...]]] = {}  # shapes of weights by configuration: making a network takes a while


def make_networks(model: Any) -> None:
    """Refuse configurations that make no network, or a network whose weights have other shapes than those in the files."""
    directory: Directory = model.directory
    if not directory.weights:  # a model whose shape alone is known
        return
    adapter = getattr(model, "adapter", None)
    for part in model.text_encoders:
        config = directory.configs[part]
        encoder = partial(lambda kind, config: kind(CLIPTextConfig.from_dict(config)), TEXT[part], config)
        check_shapes(directory, part, made(directory, part, encoder, config))
    check_shapes(directory, "vae", made(directory, "vae", partial(common.empty_vae, directory), directory.configs["vae"]))
    unet = made(directory, "unet", model.empty_denoiser, [directory.configs["unet"], adapter and adapter.configs])
    check_shapes(directory, "unet", unet)
    if adapter is not None:
        check_shapes(adapter, HERE, unet)


def made(directory: Directory, part: str, make: Callable[[], nn.Module], configs: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights of the network that `make` returns; they depend on `configs` alone."""
    key = json.dumps([part, configs, directory.index.get("_class_name")], sort_keys=True, default=str)
    if key not in _made:
        with explained(directory, part), torch.device("meta"):
            _made[key] = {name.removeprefix("text_model."): tuple(value.shape) for name, value in make().state_dict().items()}
    return _made[key]


@torch.no_grad()
def run_denoiser(model: Any) -> None:
    """Refuse a UNet that cannot run on latents and conditions of the other components' sizes: one call, without weights."""
    with explained(model.directory, "unet"), torch.device("meta"):
        unet = model.empty_denoiser()
        side = 2 ** len(unet.down_blocks)
        noise = torch.zeros(1, model.latent_channels, *(2,) * model.video, side, side)
        conditions = blank_conditions(model.directory) | ({IMAGE: noise} if model.image_condition else {})
        found = model.denoise(unet, noise, torch.zeros(1, dtype=torch.long), conditions)
        if found.shape != noise.shape:
            raise ValueError(f"it gives {tuple(found.shape)} for latents {tuple(noise.shape)}")


def blank_conditions(directory: Directory) -> dict[str, Tensor]:
    """Conditions of one prompt, as wide as the text encoders' configurations say."""
    encoders = [directory.configs[part] for part in TEXT if part in directory.configs]
    conditions = {"prompt_embeds": torch.zeros(1, 77, sum(config.get("hidden_size", 512) for config in encoders))}
    return conditions | ({"pooled": torch.zeros(1, encoders[1].get("projection_dim", 512))} if len(encoders) > 1 else {})


def check_shapes(directory: Directory, part: str, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights of other shapes than the network has; weights that loading renames are checked when they are loaded."""
    weights = directory.weights[part]
    for file in (file for file in weights.files if file.suffix == ".safetensors"):
        for name, found in shapes(file).items():
            wanted = expected.get(name.removeprefix("text_model."), found)
            if found != wanted:
                raise UserError(f"cannot load {file}: {name} has the shape {found}, and {config_file(directory, part)} makes it"
                                f" {wanted}: one of the two files is damaged, or another model's.")


def config_file(directory: Directory, part: str) -> Path:
    return directory.path / part / "config.json"


@contextmanager
def explained(directory: Directory, part: str) -> Iterator[None]:
    """Turn whatever a library raises about a configuration into a message that names its file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # its values are the only input
        raise UserError(f"{config_file(directory, part)}: the network that it describes does not work ({reason(error)[:200]})."
                        f" {ADVICE}.") from error
