"""A clip to be decoded: which frames of which file, and the square of them that the model sees."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from seppo_fast import config
from seppo_fast.data.framing import Framing, framing
from seppo_fast.data.video.frames import chosen
from seppo_fast.data.video.probe import Facts
from seppo_fast.seeds import generator


@dataclass(frozen=True)
class Clip:
    """`frame` is in the picture as it is stored; after it has been cut, mirrored or not, the square is turned by `quarters`."""

    key: str
    file: Path
    facts: Facts
    indices: list[int]
    frame: Framing
    quarters: int
    resolution: int


def clip(key: str, file: Path, facts: Facts, time_lapse: bool, data: config.Data, seed: int, epoch: int) -> Clip:
    """What the model sees of a video in an epoch; depends on (seed, key, epoch) alone, and one draw holds for all frames."""
    indices = chosen(facts.frames, data.video, time_lapse, seed, key, epoch)
    across, down = facts.pixel
    width, height = facts.width * across, facts.height * down
    if facts.quarters % 2:
        width, height = height, width
    shown = framing(width, height, data.resolution, data.crop, data.flip, generator(seed, "prepare", key, epoch))
    stored, quarters = as_stored(shown, facts, data.resolution)
    return Clip(key, file, facts, indices, stored, quarters, data.resolution)


def as_stored(shown: Framing, facts: Facts, side: int) -> tuple[Framing, int]:
    """The same square in the stored picture, and by how many quarters its pixels are still to be turned."""
    width, height = (shown.height, shown.width) if facts.quarters % 2 else (shown.width, shown.height)
    left, top = {0: (shown.left, shown.top),
                 1: (width - side - shown.top, shown.left),
                 2: (width - side - shown.left, height - side - shown.top),
                 3: (shown.top, height - side - shown.left)}[facts.quarters]
    if facts.mirrored:
        left = width - side - left
    # A mirror image of what was turned to the left is the mirror image, turned to the right.
    quarters = -facts.quarters % 4 if shown.mirror else facts.quarters
    return Framing(width, height, left, top, shown.mirror != facts.mirrored), quarters


def turned(pixels: Tensor, clip: Clip) -> Tensor:
    """The clip's squares (F, 3, R, R), upright."""
    return torch.rot90(pixels, clip.quarters, (-2, -1)).contiguous() if clip.quarters else pixels
