"""Random numbers that depend on their purpose alone, so that batch size, world size and resume cannot change them."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `key` alone, e.g. `generator(seed, "noise", slot)`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(shape: Sequence[int], seed: int, purpose: str, slots: Iterable[int]) -> Tensor:
    """Standard normal noise, fp32 on the CPU, `(len(slots), *shape)`: row i depends on (seed, purpose, slots[i]) alone."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, purpose, slot)) for slot in slots])
