"""Preference pairs: by which names a source tells winner and loser, and what a run takes of a pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from seppo_fast.data.rows import BadRow
from seppo_fast.errors import UserError
from seppo_fast.seeds import generator

T = TypeVar("T")
R = TypeVar("R")

WORDS = {"chosen": "rejected", "winner": "loser"}
FILE_NAME = "_file_name"  # `datasets` takes columns that end so for image files, and calls them by what is before it
PLAIN = ("image", "file_name")  # columns of a row's one image, or of the winner where there is a loser's column, too
# Columns of (winner, loser).
PAIRS = [pair for winner, loser in WORDS.items()
         for pair in ((winner, loser), (winner + FILE_NAME, loser + FILE_NAME), ("image", loser), ("file_name", loser + FILE_NAME))]
LOSERS = tuple(dict.fromkeys(loser for _, loser in PAIRS))
FOLDERS = {"chosen": "rejected", "winner": "loser", "winners": "losers"}
BACK = {loser: winner for winner, loser in FOLDERS.items()}


@dataclass(frozen=True)
class Use:
    """What a run takes of each pair: winner and loser where the method `needs_loser`, else one image, as `choose` says.

    `method` is the method's name in messages.
    """

    needs_loser: bool = False
    choose: str = "winner"
    seed: int = 0
    method: str = "dpo"

    @property
    def both(self) -> bool:
        """Whether each row must be a pair."""
        return self.needs_loser or self.choose == "random"

    def of(self, key: str, winner: T, loser: T) -> tuple[T, ...]:
        """(winner, loser) where the method needs both, else the one image that is trained on; the row's `key` decides by chance."""
        if self.choose == "random":
            return (winner,) if torch.rand((), generator=generator(self.seed, "choose", key)) < 0.5 else (loser,)
        return (winner, loser) if self.needs_loser else (winner,)


def each(items: Sequence[T], read: Callable[[T], R]) -> list[R]:
    """`read` of a row's image, or of winner and loser; the second one's `BadRow` says that it is about the loser."""
    found = []
    for place, item in enumerate(items):
        try:
            found.append(read(item))
        except BadRow as bad:
            raise BadRow(f"the loser: {bad}") if place else bad from None
    return found


def check_choice(use: Use) -> None:
    """`UserError` when the method needs a winner and a loser, and `choose` would mix them."""
    if use.needs_loser and use.choose == "random":
        raise UserError(f"seppo.data.choose='random' does not go with method {use.method!r}, whose winner is the preferred image;"
                        " set seppo.data.choose to 'winner'")


def refuse_single(where: str, use: Use, remedy: str, unit: str = "image") -> None:
    """For a source with one image (or clip) a row: `UserError` when the method or `choose` wants pairs."""
    if use.needs_loser:
        raise UserError(f"method {use.method!r} needs pairs of {unit}s, but {where} has one {unit} a row: {remedy}."
                        " Method 'seppo' makes its own losers")
    if use.choose == "random":
        raise UserError(f"seppo.data.choose='random' picks one {unit} of a pair, but {where} has one {unit} a row:"
                        f" {remedy}, or set seppo.data.choose to 'winner'")


def beside(place: Path, root: Path, names: Mapping[str, str] = FOLDERS) -> Path | None:
    """The folder of losers that belongs to `place`, a folder of winners (or one in it), under `root`; None where there is none.

    With `BACK` for `names`: the folder of winners that belongs to a folder of losers.
    """
    for folder in (place, *place.parents):
        if folder == root:
            return None
        other = folder.parent / names.get(folder.name, "")
        if folder.name in names and other.is_dir():
            return other / place.relative_to(folder)
    return None
