"""The networks that a model's configurations describe, made without weights and run once on the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from seppo_fast.errors import UserError, reason
from seppo_fast.models import common
from seppo_fast.models.directory import HERE, Directory
from seppo_fast.models.files import shapes
from seppo_fast.models.values import ADVICE

TEXT = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@torch.no_grad()
def try_networks(model: Any) -> None:
    """Refuse configurations of which no network can be made, whose network cannot be run, or has not the weights' shapes."""
    directory: Directory = model.directory
    with torch.device("meta"):
        for part in model.text_encoders:
            with explained(directory, part):
                encoder = TEXT[part](CLIPTextConfig.from_dict(directory.configs[part]))
                encoder(torch.zeros(1, encoder.config.max_position_embeddings, dtype=torch.long), output_hidden_states=True)
            check_shapes(directory, part, encoder)
        with explained(directory, "vae"):
            vae = common.empty_vae(directory)
            side = 8
            pixels = torch.zeros(1, 3, side * model.vae_scale_factor, side * model.vae_scale_factor)
            latents = vae.encode(pixels).latent_dist.mean
            expect(latents, (1, model.latent_channels, side, side))
            expect(vae.decode(latents).sample, pixels.shape)
        check_shapes(directory, "vae", vae)
        with explained(directory, "unet"):
            unet = model.empty_unet()
            side = 2 ** len(unet.down_blocks)
            noise = torch.zeros(1, model.latent_channels, *(2,) * model.video, side, side)
            expect(model.denoise(unet, noise, torch.zeros(1, dtype=torch.long), blank_conditions(directory)), noise.shape)
        check_shapes(directory, "unet", unet)
        if getattr(model, "adapter", None) is not None:
            check_shapes(model.adapter, HERE, unet)


def blank_conditions(directory: Directory) -> dict[str, Tensor]:
    """Conditions of one prompt, as wide as the text encoders' configurations say."""
    encoders = [directory.configs[part] for part in TEXT if part in directory.configs]
    conditions = {"prompt_embeds": torch.zeros(1, 77, sum(config.get("hidden_size", 512) for config in encoders))}
    return conditions | ({"pooled": torch.zeros(1, encoders[1].get("projection_dim", 512))} if len(encoders) > 1 else {})


def check_shapes(directory: Directory, part: str, module: nn.Module) -> None:
    """Refuse weights of other shapes than the network has; those that are renamed when they are loaded are seen to then."""
    weights = directory.weights[part]
    if not weights.safetensors:
        return
    expected = {name.removeprefix("text_model."): tuple(value.shape) for name, value in module.state_dict().items()}
    for file in (file for file in weights.files if file.suffix == ".safetensors"):
        for name, found in shapes(file).items():
            wanted = expected.get(name.removeprefix("text_model."), found)
            if found != wanted:
                raise UserError(f"{file}: {name} has the shape {found}, and {config_file(directory, part)} makes it {wanted}: one"
                                " of the two files is damaged, or another model's.")


def config_file(directory: Directory, part: str) -> Path:
    return directory.path / part / "config.json"


@contextmanager
def explained(directory: Directory, part: str) -> Iterator[None]:
    """Whatever a library raises about a configuration becomes a message that names its file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # its values are the only input
        raise UserError(f"{config_file(directory, part)}: the network that it describes does not work ({reason(error)[:200]})."
                        f" {ADVICE}.") from error


def expect(found: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(found.shape) != tuple(shape):
        raise ValueError(f"it gives {tuple(found.shape)} where {tuple(shape)} is expected")
