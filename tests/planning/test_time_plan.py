"""Hours by arithmetic: what each of a run's settings does to them, and rates that are not right."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seppo_fast.configfile import batch_plan, load_config
from seppo_fast.errors import UserError
from seppo_fast.models.published import published_model
from seppo_fast.planning.cost import Cost, estimate
from seppo_fast.planning.time_plan import SHIPPED, Rate, fraction, hours, load_rates, rollout, time_plan, work_of

RATE = Rate(device="NVIDIA A100", matmul_tflops=100.0, sampling_fraction=[(1, 0.2), (16, 0.4)], training_fraction=0.25,
            source="here")
CONFIG = load_config("ds_a100.json")
BATCH = batch_plan(CONFIG.deepspeed, 8)


@pytest.fixture(scope="module")
def cost() -> Cost:
    return estimate(published_model(CONFIG.seppo.model.path), CONFIG, BATCH)


def test_the_papers_run(cost: Cost) -> None:
    work = work_of(CONFIG, BATCH, cost)
    assert work.pairs == 7 * 61_440
    sampling, training = hours(RATE, work)
    assert sampling == pytest.approx(61_440 * 7 * 80.33e12 / 8 / 40e12 / 3600, rel=1e-3)
    assert training == pytest.approx(61_440 * 7 * (cost.training + cost.scoring) / 8 / 25e12 / 3600)
    assert hours(RATE, replace(work, gpus=1)) == pytest.approx((8 * sampling, 8 * training))
    assert hours(RATE, replace(work, sampler_batch=1))[0] == pytest.approx(2 * sampling)


def test_scoring_in_the_rollout_moves_it_to_the_samplers_rate(cost: Cost) -> None:
    work = work_of(CONFIG, BATCH, cost)
    moved = rollout(work, cost)
    assert moved.sampling + moved.training == pytest.approx(work.sampling + work.training)
    assert sum(hours(RATE, moved)) < sum(hours(RATE, work))
    assert work_of(load_config("ds_a100.json", ["seppo.reference_score=rollout"]), BATCH, cost) == moved


@pytest.mark.parametrize(("batch", "share"), [(1, 0.2), (4, 0.24), (16, 0.4), (64, 0.4)])
def test_shares_between_and_beyond_what_is_known(batch: int, share: float) -> None:
    assert fraction(RATE.sampling_fraction, batch) == pytest.approx(share)
    assert fraction(0.3, batch) == 0.3


def test_what_is_assumed_is_said(cost: Cost) -> None:
    text = time_plan(CONFIG, BATCH, cost, published_model(CONFIG.seppo.model.path), load_rates(None))
    (h200,) = [line for line in text.splitlines() if "790 TFLOP/s" in line]
    assert "assumed: that of NVIDIA A100" in h200 and "assumed: sampling's at this batch" in h200
    assert "pndm, 50 steps (102 evaluations)" in text and "ddim, 20 steps (40 evaluations)" in text
    own = RATE.model_copy(update={"device": "NVIDIA H200"})
    text = time_plan(CONFIG, BATCH, cost, published_model(CONFIG.seppo.model.path), [own])
    assert "assumed" not in text and "hours on NVIDIA H200 with" in text
    text = time_plan(CONFIG, BATCH, cost, published_model(CONFIG.seppo.model.path), [RATE.model_copy(update={"device": "a CPU"}),
                                                                                 *load_rates(None)])
    assert "assumed: that of NVIDIA A100" in text and "assumed: that of a CPU" not in text


def test_this_machines_gpu_is_marked(cost: Cost) -> None:
    text = time_plan(CONFIG, BATCH, cost, published_model(CONFIG.seppo.model.path), load_rates(None), "NVIDIA H200 NVL")
    assert "NVIDIA H200 (this machine): " in text and "hours on NVIDIA H200 with" in text
    assert "NVIDIA A100: " in text


def test_every_shipped_rate_says_whether_it_was_measured() -> None:
    for name, rate in json.loads(SHIPPED.read_text()).items():
        assert rate["source"].startswith(("measured", "published")), name


def test_rates_of_ones_own_take_the_place_of_the_shipped_ones(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    file.write_text(json.dumps({"rates": RATE.model_dump() | {"device": "NVIDIA A100-SXM4-80GB"}, "rows": []}))
    assert [rate.device for rate in load_rates(str(file))] == ["NVIDIA A100-SXM4-80GB", "NVIDIA H200"]


@pytest.mark.parametrize(("change", "expected"), [
    (lambda raw: "[]", 'no section "rates"'), (lambda raw: "{", "cannot be read"),
    (lambda raw: {"rates": raw | {"matmul_tflops": 0}}, "rates.matmul_tflops: expected a value greater than 0 (got 0)"),
    (lambda raw: {"rates": {key: value for key, value in raw.items() if key != "source"}}, "rates.source: this key is missing"),
])
def test_rates_that_are_not_right(change: Callable[[dict[str, Any]], Any], expected: str, tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    changed = change(RATE.model_dump())
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UserError, match="--rates") as caught:
        load_rates(str(file))
    assert expected in str(caught.value)
