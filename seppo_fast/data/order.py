"""Which demonstration comes when: a seeded permutation per epoch, addressed by a counter that never resets."""

from functools import lru_cache

import torch
from torch import Tensor

from seppo_fast.seeds import generator


class Order:
    """Slot (the number of pairs drawn before) -> row: a pure function of (n_rows, seed, slot), so resuming is free."""

    def __init__(self, n_rows: int, seed: int):
        if n_rows < 1:
            raise ValueError(f"n_rows must be at least 1, got {n_rows}")
        self.n_rows = n_rows
        self.seed = seed
        # Two epochs: a window of slots may straddle the end of one.
        self._permutation = lru_cache(maxsize=2)(self._draw)

    def place(self, slot: int) -> tuple[int, int]:
        """(epoch, row) of `slot`; within each epoch (n_rows slots) every row comes once."""
        epoch, place = divmod(slot, self.n_rows)
        return epoch, int(self._permutation(epoch)[place])

    def row(self, slot: int) -> int:
        """The row that `slot` trains on."""
        return self.place(slot)[1]

    def _draw(self, epoch: int) -> Tensor:
        return torch.randperm(self.n_rows, generator=generator(self.seed, "order", epoch))
