"""A trial of a model's configurations: the networks are made without weights and run once on the meta device."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seppo_fast.compiler import transformer_blocks
from seppo_fast.errors import UserError, reason
from seppo_fast.models import common
from seppo_fast.models.contract import Model
from seppo_fast.models.directory import HERE, Directory
from seppo_fast.models.files import shapes
from seppo_fast.models.pix2pix import IMAGE
from seppo_fast.models.values import ADVICE

Given = tuple[tuple[Any, ...], dict[str, Any]]  # to a block: by position, and by name
_made: dict[str, dict[str, tuple[int, ...]]] = {}  # shapes of weights by configuration: making a network takes a while


def make_networks(model: Model) -> None:
    """Refuse configurations that make no network, or a network whose weights have other shapes than those in the files."""
    directory: Directory = model.directory
    if not directory.weights:  # a model whose shape alone is known
        return
    adapter = getattr(model, "adapter", None)
    for part in model.text_encoders:
        encoder = partial(common.empty_text_encoder, directory, part)
        check_shapes(directory, part, made(directory, part, encoder, directory.configs[part]))
    check_shapes(directory, "vae", made(directory, "vae", model.empty_vae, directory.configs["vae"]))
    name = model.denoiser
    denoiser = made(directory, name, model.empty_denoiser, [directory.configs[name], adapter and adapter.configs])
    check_shapes(directory, name, denoiser)
    if adapter is not None:
        check_shapes(adapter, HERE, denoiser)


def made(directory: Directory, part: str, make: Callable[[], nn.Module], configs: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights of the network that `make` returns; they depend on `configs` alone."""
    key = json.dumps([part, configs, directory.index.get("_class_name")], sort_keys=True, default=str)
    if key not in _made:
        with explained(directory, part), torch.device("meta"):
            _made[key] = {name.removeprefix("text_model."): tuple(value.shape) for name, value in make().state_dict().items()}
    return _made[key]


@torch.no_grad()
def run_denoiser(model: Model) -> None:
    """Refuse a network that cannot run on latents and conditions of the other components' sizes: one call, without weights."""
    with explained(model.directory, model.denoiser), torch.device("meta"):
        noise, found = call_once(model, model.empty_denoiser())
        if found.shape != noise.shape:
            raise ValueError(f"it gives {tuple(found.shape)} for latents {tuple(noise.shape)}")


def call_once(model: Model, denoiser: Any) -> tuple[Tensor, Tensor]:
    """Latents of the least size that the network takes, and its output for them, on its device and in its dtype."""
    levels = len(denoiser.down_blocks) if hasattr(denoiser, "down_blocks") else 0
    side = max(2**levels, model.multiple // model.vae_scale_factor)
    noise = next(denoiser.parameters()).new_zeros(1, model.latent_channels, *(2,) * model.video, side, side)
    time = torch.zeros(1, dtype=torch.long, device=noise.device)
    return noise, model.denoise(denoiser, noise, time, blank_conditions(model, noise))


@torch.no_grad()
def block_inputs(make: Callable[[], nn.Module], call: Callable[[nn.Module], Any], dtype: torch.dtype) -> dict[str, Given]:
    """What a block of each class that is compiled block by block gets in a `call` of the network, by the block's name.

    The network that `make` returns is on the meta device, and so are its tensors.
    """
    found: dict[type, tuple[str, Given]] = {}

    def note(name: str, block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.setdefault(type(block), (name, (given, named)))

    with torch.device("meta"):
        denoiser = make().to(dtype)
        blocks = transformer_blocks(denoiser)
        for name, block in denoiser.named_modules():
            if block in blocks:
                block.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        call(denoiser)
    return dict(found.values())


def blank_conditions(model: Model, latents: Tensor) -> dict[str, Tensor]:
    """Conditions for these latents, of the shapes that the model's have, on the same device and of the same dtype."""
    conditions = {name: latents.new_zeros(len(latents), *shape) for name, shape in model.condition_shapes.items()}
    return conditions | ({IMAGE: torch.zeros_like(latents)} if model.image_condition else {})


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
