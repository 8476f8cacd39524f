"""The order of the demonstrations: a seeded permutation per epoch, indexed by a counter that never resets; which are held out."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from seppo_fast.errors import UserError
from seppo_fast.seeds import generator


class Order:
    """Slot (the number of pairs drawn before) -> row: a pure function of (rows, seed, slot), so resuming is free.

    `rows`: those that come at all; None is every one of `n_rows`.
    """

    def __init__(self, n_rows: int, seed: int, rows: Sequence[int] | None = None):
        self.rows = range(n_rows) if rows is None else rows
        if len(self.rows) < 1:
            raise ValueError(f"n_rows must be at least 1, got {len(self.rows)}")
        self.n_rows = len(self.rows)
        self.seed = seed
        # Two epochs: a window of slots may straddle the end of one.
        self._permutation = lru_cache(maxsize=2)(self._draw)

    def place(self, slot: int) -> tuple[int, int]:
        """(epoch, row) of `slot`; within each epoch (n_rows slots) every row comes once."""
        epoch, place = divmod(slot, self.n_rows)
        return epoch, self.rows[int(self._permutation(epoch)[place])]

    def row(self, slot: int) -> int:
        """The row that `slot` trains on."""
        return self.place(slot)[1]

    def _draw(self, epoch: int) -> Tensor:
        return torch.randperm(self.n_rows, generator=generator(self.seed, "order", epoch))


def split(n_rows: int, hold_out: int | float | None, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """The rows that are trained on, and those that are held out: a pure function of the arguments, ascending.

    `hold_out` is a number of rows, or a share of them; `UserError` where that leaves nothing on one side.
    """
    if hold_out is None:
        return range(n_rows), []
    count = hold_out if isinstance(hold_out, int) else round(hold_out * n_rows)
    if not 0 < count < n_rows:
        there = f"of {n_rows} demonstrations that is {count}" if count != hold_out else f"there are {n_rows} demonstrations"
        raise UserError(f"seppo.data.hold_out={hold_out}: {there}, and at least one must be held out and one be trained on; give"
                        " another share or number")
    mixed = torch.randperm(n_rows, generator=generator(seed, "hold out")).tolist()
    return sorted(mixed[count:]), sorted(mixed[:count])
