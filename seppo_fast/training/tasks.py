"""What the improvement model learns from a pair: one of three tasks a slot (Eq. 6, 7, 8), so that it also heeds its image."""

from typing import NamedTuple

import torch

from seppo_fast.config import Tasks
from seppo_fast.seeds import generator

IMPROVE, RECONSTRUCT, UNCONDITIONAL = range(3)
NAMES = ("improve", "reconstruct", "unconditional")


class Task(NamedTuple):
    """Which task, and whether the picture to be learnt is the pair's winner, or else its loser."""

    kind: int
    winner: bool


def task_of(slot: int, seed: int, shares: Tasks) -> Task:
    """The task of a slot: the winner from the loser and the prompt; a picture from itself; a picture from nothing."""
    random = generator(seed, "task", slot)
    number, half = torch.rand(2, generator=random, dtype=torch.double).tolist()
    kind = IMPROVE if number < shares.improve else RECONSTRUCT if number < shares.improve + shares.reconstruct else UNCONDITIONAL
    return Task(kind, kind == IMPROVE or half < 0.5)
