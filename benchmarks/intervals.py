"""95 % t-intervals over seeds, and what one says about a finding."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import t


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % t-interval; None for a single value, which has no spread."""

    mean: float
    half: float | None

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


def interval(values: Sequence[float]) -> Interval:
    """The mean of the values, one for each seed, with its interval."""
    count = len(values)
    if count < 2:
        return Interval(mean(values), None)
    return Interval(mean(values), float(t.ppf(0.975, count - 1)) * stdev(values) / count**0.5)


def minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Differences paired by seed."""
    return [x - y for x, y in zip(a, b, strict=True)]


def verdict(found: Interval, alike: bool) -> str:
    """`agrees`, `disagrees` or `open`. An interval that contains zero is `open`, and agrees where the paper says `alike`."""
    if found.half is None:
        return "open"
    if found.low <= 0 <= found.high:
        return "agrees" if alike else "open"
    return "agrees" if found.low > 0 and not alike else "disagrees"
