"""Sample grids: a row for each prompt, its text above it. The noise never changes, so two grids differ by the policy alone."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from seppo_fast.config import Samples
from seppo_fast.disk import complete_or_not
from seppo_fast.models import Conditions, Model
from seppo_fast.pictures import picture, save_clip
from seppo_fast.seeds import normal

PROMPTS = 4  # how many of the data's prompts are used where none are given
STILL, MOVING = ".png", ".webp"
VISIBLE = 128  # pixels to which the longer side of small samples is enlarged
GAP, CAPTION, FONT = 1, 16, 12  # pixels between samples, of a line of text, and of its letters
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf")
LONGEST = 1000  # characters of a prompt that are measured
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Grids:
    """Draws grids into `folder`; `conditions` are the prompts' embeddings, repeated per sample.

    `pair`: scaled latents, one a prompt, that are shown on the left and on the right of each row of samples.
    """

    folder: Path
    model: Model
    settings: Samples
    conditions: Conditions
    shape: tuple[int, ...]
    device: torch.device
    pair: tuple[Tensor, Tensor] | None = None

    def write(self, update: int, draw: Callable[[Tensor, Conditions], Tensor]) -> Path:
        """Draw and decode every sample, write `update_00000030.png`, or .webp where they move."""
        count = len(self.settings.prompts) * self.settings.per_prompt
        noise = normal(self.shape, self.settings.seed, "grid", range(count)).to(self.device)
        latents, columns = draw(noise, self.conditions), self.settings.per_prompt
        if self.pair is not None:
            left, right = (latent.to(latents)[:, None] for latent in self.pair)
            latents = torch.cat([left, latents.unflatten(0, (-1, columns)), right], dim=1).flatten(0, 1)
            columns += 2
        vae = self._vae.to(self.device)
        images = [self.model.decode(vae, latent).cpu() for latent in latents.split(1)]  # pixels take much memory
        vae.to("cpu")  # training needs the memory
        self.folder.mkdir(parents=True, exist_ok=True)
        return save_sheet(torch.cat(images), self.settings.prompts, columns, self.model.frame_rate, self.folder / name(update))

    def drawn(self, update: int) -> bool:
        """Whether there is a grid of this update."""
        return any((self.folder / name(update)).with_suffix(suffix).exists() for suffix in (STILL, MOVING))

    @cached_property
    def _vae(self) -> torch.nn.Module:
        return self.model.load_vae("cpu")


def name(update: int) -> str:
    """A grid's file name, without its suffix."""
    return f"update_{update:08d}"


def save_sheet(samples: Tensor, prompts: Sequence[str], columns: int, rate: int, path: Path) -> Path:
    """`(N, 3, H, W)` as a PNG, `(N, F, 3, H, W)` as an animated WebP that loops; returns the file, `path` with its suffix."""
    moves = samples.dim() == 5
    path = path.with_suffix(MOVING if moves else STILL)
    with complete_or_not(path) as temporary:
        if moves:
            save_clip([sheet(frame, prompts, columns) for frame in samples.unbind(1)], rate, temporary)
        else:
            sheet(samples, prompts, columns).save(temporary)
    return path


@dataclass(frozen=True)
class Layout:
    """Where the samples of `(H, W)` are on a sheet, each of their pixels as a square of `scale`."""

    height: int
    width: int
    columns: int

    @property
    def scale(self) -> int:
        """Factor by which small samples are enlarged: a whole number, so that no pixel is interpolated."""
        return max(1, VISIBLE // max(self.height, self.width))

    def place(self, index: int) -> tuple[int, int]:
        """(left, top) of a sample."""
        return (index % self.columns * (self.width * self.scale + GAP),
                CAPTION + index // self.columns * (CAPTION + self.height * self.scale + GAP))

    def size(self, count: int) -> tuple[int, int]:
        """(width, height) of a sheet of so many samples."""
        left, top = self.place(-(-count // self.columns) * self.columns - 1)
        return left + self.width * self.scale, top + self.height * self.scale


def sheet(images: Tensor, prompts: Sequence[str], columns: int) -> Image.Image:
    """`(N, 3, H, W)` in [0, 1] as one picture: a row of `columns` samples for each prompt, which stands above, cut to the width."""
    height, width = images.shape[-2:]
    layout = Layout(height, width, columns)
    canvas = Image.new("RGB", layout.size(len(images)), "white")
    draw, font = ImageDraw.Draw(canvas), letters()
    for index, image in enumerate(images):
        tile = picture(image)
        tile = tile.resize((tile.width * layout.scale, tile.height * layout.scale), Image.Resampling.NEAREST)
        left, top = layout.place(index)
        canvas.paste(tile, (left, top))
        if index % columns == 0:
            draw.text((0, top - CAPTION), shortened(prompts[index // columns], canvas.width, font), "black", font)
    return canvas


@cache
def letters() -> Font:
    """The first font of FONTS, which cover many languages, that the system has; else Pillow's own, with English letters."""
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, FONT)
    return ImageFont.load_default(FONT)


def shortened(text: str, width: int, font: Font) -> str:
    """A text on one line, cut to `width` pixels."""
    text = " ".join(text.split())[:LONGEST]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
