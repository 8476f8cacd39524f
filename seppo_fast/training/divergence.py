"""Detects divergence by the policy's error on the winners: the loss may be small although the policy is destroyed."""

import math
import statistics
from collections.abc import Sequence

REMEMBERED = 100  # errors in range that a state keeps
FACTOR, SPREADS = 4.0, 6.0


def largest_in_range(errors: Sequence[float]) -> float:
    """The largest winners' error (`model_mse_winner`) that is in range, given the last `errors` that were in range.

    It is FACTOR times their median, or the median and SPREADS times their robust spread if that is more. Errors spread by a
    factor, because each window has other timesteps, so the spread is that of logarithms: 1.4826 times the median deviation.
    """
    if not errors:
        return math.inf
    logs = [math.log(max(error, 1e-30)) for error in errors]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(log - middle) for log in logs)
    return math.exp(min(700.0, middle + max(SPREADS * spread, math.log(FACTOR))))
