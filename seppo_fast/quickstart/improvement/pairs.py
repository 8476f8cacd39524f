"""Preference pairs whose winners range from poor to good: a digit in two degrees of degradation."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from seppo_fast.pictures import png
from seppo_fast.quickstart.digits import CAPTIONS, Digits
from seppo_fast.seeds import generator

LEAST = 0.3  # level of the best losers
GAIN = (0.15, 0.4)  # how much better a winner is than its loser


@dataclass(frozen=True)
class Pairs:
    """Winner and loser of the same digit, `(N, 3, 16, 16)` in [0, 1], and their levels of degradation, `(N,)`."""

    winners: Digits
    losers: Digits
    winner_levels: Tensor
    loser_levels: Tensor


def degrade_to(pixels: Tensor, levels: Tensor, random: torch.Generator) -> Tensor:
    """Pictures `(B, 3, H, W)` in [0, 1] with less contrast and more grain; level 0 leaves them as they are, 1 hides them mostly."""
    levels = levels.view(-1, 1, 1, 1)
    height, width = pixels.shape[-2:]
    # Grain two pixels wide: finer grain would be lost in the VAE's 2x2 down-sampling.
    grain = torch.randn(len(pixels), 1, height // 2, width // 2, generator=random)
    grain = grain.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return (0.5 + (pixels - 0.5) * (1 - 0.7 * levels) + 0.175 * levels * grain).clamp(0, 1)


def make_pairs(digits: Digits, seed: int, copies: int) -> Pairs:
    """`copies` pairs of every digit: the loser's level from [0.3, 1], the winner's lower by 0.15 to 0.4, and not below 0."""
    random = generator(seed, "improvement pairs")
    pixels, labels = digits.pixels.repeat(copies, 1, 1, 1), digits.labels.repeat(copies)
    losers = LEAST + (1 - LEAST) * torch.rand(len(labels), generator=random)
    winners = (losers - GAIN[0] - (GAIN[1] - GAIN[0]) * torch.rand(len(labels), generator=random)).clamp(min=0)
    return Pairs(Digits(degrade_to(pixels, winners, random), labels), Digits(degrade_to(pixels, losers, random), labels),
                 winners, losers)


def write_pairs(path: Path, pairs: Pairs) -> int:
    """The pairs as Pick-a-Pic's parquet, the winner on either side; returns how many."""
    rows = []
    for row, label in enumerate(pairs.winners.labels.tolist()):
        pictures = [png(pairs.winners.pixels[row]), png(pairs.losers.pixels[row])]
        first = row % 2 == 0
        rows.append({"jpg_0": pictures[not first], "jpg_1": pictures[first], "label_0": float(first), "caption": CAPTIONS[label]})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return len(rows)
