"""A score of single images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

Scorer = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]  # RGB images and their prompts -> (N,) fp32 on the CPU


@dataclass(frozen=True)
class Score:
    """A score: its names, where its weights are published, and how they are loaded."""

    name: str  # what --scores says, and the column of scores.csv
    label: str  # the table's heading
    wants: Mapping[str, str]  # part -> hub id, or "owner/name/FILE" for one file of a repository
    load: Callable[[Mapping[str, Path], torch.device], Scorer]  # located parts -> scorer; UserError names a file that does not fit
    better: str = "higher"
    packages: tuple[str, ...] = ()  # that it needs besides the program's own
