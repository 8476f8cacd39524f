"""`beta: "auto"`: how it is computed, from which pairs, and that it survives a kill. `test_plain_loop.py` has a whole run of it."""

import json
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forks, Strike
from outcomes import apart, column, steady_rows, weights
from pydantic import TypeAdapter

from seppo_fast.training import checkpoint
from seppo_fast.training.beta import Margins
from seppo_fast.training.checkpoint import State

NONE = Margins()
PAIR = (1.0, 1.0, 1.0, 1.0, -1.0, 0.0)  # of a table: a tie


def pairs(margins: Sequence[float], sign: float = -1.0, error: float = 1.0) -> torch.Tensor:
    """A table whose pairs have these margins, all of the winner's."""
    return torch.tensor([[error + margin, error, error, error, sign, 0.0] for margin in margins])


def test_nothing_seen_is_the_papers_beta() -> None:
    assert NONE.beta == 2000 and NONE.after(pairs([0.0, 0.0])) is NONE


def test_one_update_counts_in_full_and_older_ones_fade() -> None:
    once = NONE.after(pairs([0.25, -0.75]))
    assert once.beta == pytest.approx(2.77 / 0.5, rel=1e-12)
    twice = once.after(pairs([1.0, 1.0]))
    assert twice.beta == pytest.approx(2.77 * 0.19 / (0.09 * 0.5 + 0.1), rel=1e-12)
    for _ in range(200):
        twice = twice.after(pairs([0.125]))
    assert twice.beta == pytest.approx(2.77 / 0.125, rel=1e-6)


@pytest.mark.parametrize(("sign", "margin"), [(-1.0, 0.5 - 0.25), (1.0, 0.5 + 0.25), (0.0, 0.5)])
def test_the_margin_has_the_pairs_sign(sign: float, margin: float) -> None:
    table = torch.tensor([[1.5, 2.25, 1.0, 2.0, sign, 0.0]])
    assert NONE.after(table).beta == pytest.approx(2.77 / margin, rel=1e-12)


def test_an_update_of_ties_leaves_the_mean_alone() -> None:
    seen = NONE.after(pairs([0.5]))
    assert seen.after(pairs([0.0] * 4)) is seen
    assert seen.after(pairs([2**-22, -(2**-23)])) is seen  # the same errors, computed in other batches
    assert seen.after(pairs([2**-22], error=1e-3)) is not seen


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(5))
def test_pairs_that_are_not_finite_are_left_out(bad: float, place: int) -> None:
    table = torch.cat([pairs([0.5]), torch.tensor([PAIR])])
    table[1, place] = bad
    assert NONE.after(table) == NONE.after(pairs([0.5]))
    assert NONE.after(table[1:]) is NONE and NONE.after(table[:0]) is NONE


def test_a_logit_that_overflowed_does_not_hide_its_pair() -> None:
    """Else a beta that is too large would stay."""
    table = pairs([0.5])
    table[:, 5] = -math.inf
    assert NONE.after(table) == NONE.after(pairs([0.5]))


def test_one_large_margin_does_not_count_for_all() -> None:
    assert NONE.after(pairs([0.5, 0.5, 1e30])).beta == pytest.approx(2.77 / 0.5, rel=1e-12)


def test_a_beta_out_of_fp32s_range_is_not_taken() -> None:
    assert NONE.after(pairs([1e-39], error=0.0)) is NONE
    assert NONE.after(pairs([3.4e38])) is NONE


def test_the_order_of_the_pairs_does_not_count() -> None:
    table = pairs(torch.randn(1000, generator=torch.Generator().manual_seed(0)).tolist())
    assert NONE.after(table) == NONE.after(table.flip(0))


def test_the_state_keeps_it_exactly(tmp_path: Path) -> None:
    margins = NONE.after(pairs([1 / 3, 0.1])).after(pairs([0.7]))
    state = State("run", 1, None, {}, margins=margins)
    (tmp_path / "state.json").write_text(json.dumps(asdict(state)))
    assert checkpoint.read_state(tmp_path).margins == margins
    old = {name: value for name, value in asdict(state).items() if name != "margins"}  # of an earlier version
    assert TypeAdapter(State).validate_json(json.dumps(old), strict=True).margins == NONE


# 2 iterations of 4 updates of 2 micro-batches; eps: where a gradient is nothing but rounding, Adam would make a whole step of it.
AUTO = {"seppo.beta": "auto", "seppo.updates_per_iteration": 4, "seppo.reference": "latest", "seppo.checkpoint.every": 1,
        "seppo.sampler.steps": 2, "seppo.sampler.batch_size": 4, "optimizer.params.eps": 1e-5}


def test_logits_are_neither_flat_nor_saturated(trained: Callable[..., Path]) -> None:
    run = trained(**AUTO)
    betas, typical = column(run, "beta"), column(run, "abs_logit_p50")
    assert betas[:2] == [2000, 2000] and typical[0] == 0, "ties in the first update: no margin was seen"
    assert betas[4] == betas[5] and typical[4] == 0, "ties in the first one of the next iteration leave it alone"
    assert len({*betas}) == 6
    assert all(0.5 < typical[update] < 3 for update in (2, 3, 6, 7))


def test_killed_in_an_iteration_and_resumed(settings: Any, trained: Callable[..., Path], forks: Forks, tmp_path: Path) -> None:
    whole, broken, raw = trained(**AUTO), tmp_path / "broken", settings(**AUTO, **{"seppo.output_dir": str(tmp_path / "broken")})
    strike = Strike("seppo_fast.training.objective:Objective.__call__", 6)  # the last one of update 3
    assert forks.run(raw, strike=strike).statuses == [-signal.SIGKILL]
    assert column(broken, "update") == [1, 2] and column(whole, "beta")[2] != 2000
    result = forks.run(raw, "--resume", "auto")
    assert result.statuses == [0], result.output[-2000:]
    assert steady_rows(whole) == steady_rows(broken)
    names = [file.relative_to(whole) for file in sorted((whole / "final").rglob("*")) if file.is_file()]
    assert len(names) > 1 and [name for name in names if (whole / name).read_bytes() != (broken / name).read_bytes()] == []


def test_two_ranks_have_the_same_betas(settings: Any, trained: Callable[..., Path], forks: Forks, tmp_path: Path) -> None:
    one, two = trained(**AUTO), tmp_path / "two"
    result = forks.run(settings(**AUTO, **{"seppo.output_dir": str(two)}), ranks=2)
    assert result.statuses == [0, 0], result.output[-2000:]
    assert column(two, "beta") == pytest.approx(column(one, "beta"), rel=1e-4)
    assert apart(weights(one), weights(two)) < 2e-6
