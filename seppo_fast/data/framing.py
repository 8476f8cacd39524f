"""Which square of a picture the model sees (as DiffusionDPO's `train_transforms`)."""

from dataclasses import dataclass

import torch

from seppo_fast.data.rows import BadRow

# Beyond this, scaling the short side to 512 makes gigabytes out of a few kilobytes.
LONGEST_ASPECT = 64


@dataclass(frozen=True)
class Framing:
    """How a picture is cut: scale it to `width` x `height`, take the square at (`left`, `top`), mirror that if `mirror`."""

    width: int
    height: int
    left: int
    top: int
    mirror: bool


def framing(width: int, height: int, resolution: int, crop: str, flip: bool, generator: torch.Generator) -> Framing:
    """Short side to `resolution`, center or random crop, mirror; `BadRow` when the picture is too long for that."""
    size = scaled(width, height, resolution)
    spare_x, spare_y = size[0] - resolution, size[1] - resolution
    if crop == "random":
        top = int(torch.randint(0, spare_y + 1, (), generator=generator))
        left = int(torch.randint(0, spare_x + 1, (), generator=generator))
    else:
        top, left = round(spare_y / 2), round(spare_x / 2)
    return Framing(*size, left, top, flip and float(torch.rand((), generator=generator)) < 0.5)


def framed_alike(first: Framing, width: int, height: int, resolution: int, crop: str) -> Framing:
    """The framing of a picture like that of another one of any size: the same relative place, mirrored if the other is."""
    size = scaled(width, height, resolution)

    def place(offset: int, spare: int, here: int) -> int:
        return round(here * offset / spare) if crop == "random" and spare else round(here / 2)

    left = place(first.left, first.width - resolution, size[0] - resolution)
    top = place(first.top, first.height - resolution, size[1] - resolution)
    return Framing(*size, left, top, first.mirror)


def scaled(width: int, height: int, resolution: int) -> tuple[int, int]:
    """The size whose short side is `resolution`; `BadRow` when the long side would be too long."""
    if max(width, height) > LONGEST_ASPECT * min(width, height):
        raise BadRow(f"{width}x{height} pixels: more than {LONGEST_ASPECT} times as long as wide")
    # torchvision's Resize(int): the long side is truncated, not rounded.
    if width <= height:
        return resolution, int(resolution * height / width)
    return int(resolution * width / height), resolution
