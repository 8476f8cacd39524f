"""Means and win rates with their uncertainty: the 95 % bootstrap interval over prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seppo_fast.seeds import generator

RESAMPLES = 2000
LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A mean, the bounds of its 95 % interval and the `count` of its values. Without values, all but `count` are None."""

    mean: float | None
    low: float | None
    high: float | None
    count: int


def mean_of(values: Sequence[float | None], prompts: Sequence[int]) -> Interval:
    """The mean of the finite values. The bootstrap resamples prompts, not samples, since samples of one prompt are alike."""
    known = [(value, prompt) for value, prompt in zip(values, prompts, strict=True) if is_finite(value)]
    if not known:
        return Interval(None, None, None, 0)
    numbers = torch.tensor([value for value, _ in known], dtype=torch.double)
    _, owner = torch.tensor([prompt for _, prompt in known]).unique(return_inverse=True)
    low, high = bootstrap(numbers, owner)
    return Interval(float(numbers.mean()), low, high, len(known))


def win_rate(values: Sequence[float | None], others: Sequence[float | None], prompts: Sequence[int], better: str) -> Interval:
    """The share of samples that are better than the other model's from the same noise; a tie counts half. Pairs without a value
    do not count."""
    sign = 1 if better == "higher" else -1
    won = [(0.5 + 0.5 * ((sign * value > sign * other) - (sign * value < sign * other)))
           if is_finite(value) and is_finite(other) else None for value, other in zip(values, others, strict=True)]
    return mean_of(won, prompts)


def bootstrap(values: Tensor, owner: Tensor) -> tuple[float, float]:
    """Bounds of the mean of `values` (N,) when their owners, numbered from 0, are resampled with a fixed seed."""
    count = int(owner.max()) + 1
    sums = torch.zeros(count, dtype=torch.double).index_add_(0, owner, values)
    sizes = torch.zeros(count, dtype=torch.double).index_add_(0, owner, torch.ones_like(values))
    random, means = generator("bootstrap", count), []
    for part in torch.arange(RESAMPLES).split(max(1, 2**22 // count)):  # a few tens of megabytes at once
        drawn = torch.randint(count, (len(part), count), generator=random)
        means.append(sums[drawn].sum(dim=1) / sizes[drawn].sum(dim=1))
    low, high = torch.quantile(torch.cat(means), torch.tensor(LEVELS, dtype=torch.double)).tolist()
    return low, high


def is_finite(value: float | None) -> bool:
    return value is not None and abs(value) < float("inf")
