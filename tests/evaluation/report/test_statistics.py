"""Means, win rates and their bootstrap intervals."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from seppo_fast.evaluation.report.statistics import mean_of, win_rate


def test_the_interval_is_scipys() -> None:
    random = np.random.default_rng(0)
    values = random.normal(20, 1, 200)
    ours = mean_of(values.tolist(), range(200))
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=random).confidence_interval
    assert ours.mean == pytest.approx(values.mean()) and ours.count == 200
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.1 * width and abs(ours.high - theirs.high) < 0.1 * width
    assert mean_of(values.tolist(), range(200)) == ours  # the seed is fixed


def test_samples_of_one_prompt_do_not_count_as_independent() -> None:
    random = np.random.default_rng(1)
    of_prompt = random.normal(0, 1, 50)
    alike = np.repeat(of_prompt, 8).tolist()
    apart, together = mean_of(of_prompt.tolist(), range(50)), mean_of(alike, np.repeat(range(50), 8).tolist())
    assert together.high - together.low == pytest.approx(apart.high - apart.low, rel=1e-9)
    naive = mean_of(alike, range(400))
    assert naive.high - naive.low < 0.5 * (together.high - together.low)


def test_values_that_are_none_or_not_finite_do_not_count() -> None:
    found = mean_of([1.0, None, math.nan, 3.0, math.inf], [0, 1, 2, 3, 4])
    assert (found.mean, found.count) == (2.0, 2)
    nothing = mean_of([None, math.nan], [0, 1])
    assert (nothing.mean, nothing.low, nothing.high, nothing.count) == (None, None, None, 0)


def test_one_prompt_has_no_width() -> None:
    found = mean_of([1.0, 3.0], [7, 7])
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0)


def test_a_win_is_the_better_value_and_a_tie_is_half() -> None:
    found = win_rate([2.0, 1.0, 5.0, None], [1.0, 1.0, 6.0, 0.0], [0, 1, 2, 3], "higher")
    assert found.mean == pytest.approx((1 + 0.5 + 0) / 3) and found.count == 3
    assert win_rate([2.0, 1.0, 5.0], [1.0, 1.0, 6.0], [0, 1, 2], "lower").mean == pytest.approx((0 + 0.5 + 1) / 3)
    assert win_rate([2.0] * 9, [1.0] * 9, range(9), "higher").low == 1.0
