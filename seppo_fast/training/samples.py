"""Sample grids: one row a prompt, from noise that never changes, so that two grids differ by the policy alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from seppo_fast.config import Samples
from seppo_fast.disk import complete_or_not
from seppo_fast.models import Conditions, Model
from seppo_fast.pictures import picture, save_clip
from seppo_fast.seeds import normal

PROMPTS = 4  # of the data, where none are given
STILL, MOVING = ".png", ".webp"


@dataclass(frozen=True)
class Grids:
    """Draws grids into `folder`; `conditions` are the prompts' embeddings, repeated per sample."""

    folder: Path
    model: Model
    settings: Samples
    conditions: Conditions
    shape: tuple[int, ...]
    device: torch.device

    def write(self, update: int, draw: Callable[[Tensor, Conditions], Tensor]) -> Path:
        """Draw and decode every sample, write `update_00000030.png`, or .webp where they move."""
        count = len(self.settings.prompts) * self.settings.per_prompt
        noise = normal(self.shape, self.settings.seed, "grid", range(count)).to(self.device)
        latents = draw(noise, self.conditions)
        vae = self._vae.to(self.device)
        images = [self.model.decode(vae, latent).cpu() for latent in latents.split(1)]  # pixels are large beside a trainer
        vae.to("cpu")  # the memory is the training's
        self.folder.mkdir(parents=True, exist_ok=True)
        return save_sheet(torch.cat(images), self.settings.per_prompt, self.folder / name(update))

    def drawn(self, update: int) -> bool:
        """Whether there is a grid of this update."""
        return any((self.folder / name(update)).with_suffix(suffix).exists() for suffix in (STILL, MOVING))

    @cached_property
    def _vae(self) -> torch.nn.Module:
        return self.model.load_vae("cpu")


def name(update: int) -> str:
    """A grid's file name, without its suffix."""
    return f"update_{update:08d}"


def save_sheet(samples: Tensor, columns: int, path: Path) -> Path:
    """`(N, 3, H, W)` as a PNG, `(N, F, 3, H, W)` as an animated WebP that loops; returns the file, `path` with its suffix."""
    moves = samples.dim() == 5
    path = path.with_suffix(MOVING if moves else STILL)
    with complete_or_not(path) as temporary:
        if moves:
            save_clip([tile(frame, columns) for frame in samples.unbind(1)], temporary)
        else:
            tile(samples, columns).save(temporary)
    return path


def tile(images: Tensor, columns: int) -> Image.Image:
    """`(N, 3, H, W)` in [0, 1] as one picture with `columns` a row and a pixel of white between."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    return picture(sheet)
