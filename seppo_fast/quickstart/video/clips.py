"""Clips of scikit-learn's digits that travel over a dark canvas, with captions, and the faulty crawl that the base learns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from seppo_fast.quickstart.digits import RESOLUTION as DIGIT
from seppo_fast.quickstart.digits import WORDS, Digits, degrade
from seppo_fast.seeds import generator

FRAMES = 16  # unless a model asks for another number
RESOLUTION = 32
TRAVEL = RESOLUTION - DIGIT  # pixels from the first frame to the last
DIRECTIONS = ("left", "right", "up", "down")
STEPS = torch.tensor([(-1, 0), (1, 0), (0, -1), (0, 1)])  # (x, y) of each direction; y grows downwards
CAPTIONS = tuple(f"{'an' if word == 'eight' else 'a'} {word} moving {direction}" for word in WORDS for direction in DIRECTIONS)


@dataclass(frozen=True)
class Clips:
    """Grey clips `(N, F, 1, 32, 32)` in [0, 1] and the caption of each, an index of CAPTIONS, `(N,)` long."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def clips_of(digits: Digits, directions: Tensor, across: Tensor, frames: int = FRAMES) -> Clips:
    """Clips of each digit crossing the canvas in its direction `(N,)`, `across` `(N,)` pixels from the left or upper edge."""
    travelled = torch.linspace(0, TRAVEL, frames).round().long()
    step = STEPS[directions]  # (N, 2)
    start = torch.where(step < 0, TRAVEL, torch.where(step > 0, 0, across[:, None]))
    places = start[:, None] + step[:, None] * travelled[:, None]  # (N, F, 2): left and upper edge
    return Clips(_drawn(digits, places), digits.labels * len(DIRECTIONS) + directions)


def random_clips(digits: Digits, count: int, random: torch.Generator, frames: int = FRAMES) -> Clips:
    """`count` clips with all digits and directions equally often, each along the middle of the canvas."""
    order = torch.cat([torch.randperm(len(digits), generator=random) for _ in range(-(-count // len(digits)))])[:count]
    directions = torch.arange(count)[torch.randperm(count, generator=random)] % len(DIRECTIONS)
    return clips_of(Digits(digits.pixels[order], digits.labels[order]), directions, torch.full((count,), TRAVEL // 2), frames)


def spoiled(clips: Clips, wrong_directions: float, bad_motion: float, degraded: float, seed: int) -> Clips:
    """The clips as a crawl with faults: shares of them have the wrong direction in the caption, move badly, or are degraded."""
    random, count = generator(seed, "video crawl"), len(clips)
    pixels, labels = clips.pixels.clone(), clips.labels.clone()
    bad = torch.rand(count, generator=random) < bad_motion
    pixels[bad] = spoil_motion(pixels[bad], random)
    dirty = torch.rand(count, generator=random) < degraded
    pixels[dirty] = degrade(pixels[dirty].flatten(0, 1), random).view_as(pixels[dirty])
    wrong = torch.rand(count, generator=random) < wrong_directions
    turned = (labels + torch.randint(1, len(DIRECTIONS), (count,), generator=random)) % len(DIRECTIONS)
    labels = torch.where(wrong, labels // len(DIRECTIONS) * len(DIRECTIONS) + turned, labels)
    return Clips(pixels, labels)


def spoil_motion(pixels: Tensor, random: torch.Generator) -> Tensor:
    """The clips with spoiled motion: half stand still at a random frame, half have their frames in a random order."""
    count, length = pixels.shape[:2]
    frozen = torch.randint(length, (count, 1), generator=random).expand(-1, length)
    shuffled = torch.rand(count, length, generator=random).argsort(dim=1)
    frames = torch.where(torch.rand(count, 1, generator=random) < 0.5, frozen, shuffled)
    return pixels[torch.arange(count)[:, None], frames]


def _drawn(digits: Digits, places: Tensor) -> Tensor:
    """The digits with their upper left corners at `places` (N, F, 2), as (N, F, 1, 32, 32)."""
    count, length = places.shape[:2]
    canvas = torch.zeros(count, length, 1, RESOLUTION, RESOLUTION)
    span = torch.arange(DIGIT)
    columns = places[..., 0, None, None] + span
    rows = places[..., 1, None, None] + span[:, None]
    clip, frame = torch.arange(count)[:, None, None, None], torch.arange(length)[:, None, None]
    canvas[clip, frame, 0, rows, columns] = digits.pixels[:, None, 0].expand(-1, length, -1, -1)
    return canvas
