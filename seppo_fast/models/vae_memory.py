"""How a VAE saves memory: large pictures in overlapping tiles, and one sample at a time. Both are diffusers' own."""

from dataclasses import dataclass
from typing import TypeVar

import torch

from seppo_fast.errors import UserError

Model = TypeVar("Model")  # as contract.py has it
Vae = TypeVar("Vae")


@dataclass(frozen=True)
class VaeMemory:
    """`tiling` changes a little of what is larger than a tile, in latents and pixels; `slicing` nothing but rounding."""

    tiling: bool = False
    slicing: bool = False

    def set_up(self, vae: Vae) -> Vae:
        """The VAE, which saves memory so from now on."""
        if self.tiling:
            vae.enable_tiling()
        if self.slicing:
            vae.enable_slicing()
        return vae


PLAIN = VaeMemory()


def with_vae_memory(model: Model, memory: VaeMemory, tiling: str = "seppo.model.vae_tiling",
                    slicing: str = "seppo.model.vae_slicing") -> Model:
    """The model, whose VAE saves memory so; `UserError` where its VAE cannot. `tiling` and `slicing` are the settings' names."""
    with torch.device("meta"):
        vae = model.empty_vae()
    for asked, label, name in ((memory.tiling, tiling, "use_tiling"), (memory.slicing, slicing, "use_slicing")):
        if asked and not hasattr(vae, name):
            raise UserError(f"{label}: the {type(vae).__name__} of {model.path} has no {name.removeprefix('use_')}; leave it out")
    if memory.tiling:
        check_tiles(model, vae, tiling)
    model.vae_memory = memory
    return model


def check_tiles(model: Model, vae: Vae, label: str) -> None:
    """Refuse a VAE whose tiles are no whole number of latents: they would be put together at wrong places."""
    size = getattr(vae, "tile_sample_min_size", None)  # of the sample_size in its config.json
    if size is None:
        step = vae.tile_sample_stride_height  # fixed, whatever the configuration
        sound = step % model.vae_scale_factor == 0 and vae.tile_sample_min_height % model.vae_scale_factor == 0
    else:
        sound = size % (4 * model.vae_scale_factor) == 0  # a quarter overlaps
    if not sound:
        what = f"sample_size is {size}" if size is not None else f"it shrinks pictures by {model.vae_scale_factor}"
        raise UserError(f"{label}: {model.path / 'vae' / 'config.json'}: {what}, of which no tiles of whole latents can be made;"
                        " leave it out")
