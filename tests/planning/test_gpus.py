"""Other numbers of GPUs: what is sent, by hand; how the batch is shared; the table, and numbers that are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seppo_fast.configfile import Config, batch_plan, given_config, load_config
from seppo_fast.errors import UserError
from seppo_fast.models import Model
from seppo_fast.models.published import published_model
from seppo_fast.planning.communication import Cluster, one_way, sent
from seppo_fast.planning.cost import Cost, estimate
from seppo_fast.planning.disk import Part
from seppo_fast.planning.dry_run import dry_run
from seppo_fast.planning.gpus import Hours, check_numbers, chosen, fit, gpus_plan, hours_of, plans, written_bytes
from seppo_fast.planning.time_plan import SHIPPED, Rate, hours, load_rates, work_of

GB = 10**9
LINKS = Cluster(gpus_per_node=8, link_gb_s=100, network_gb_s=40, reached=0.5, stragglers=0.1, disk_gb_s=4, source="test")
CONFIG = load_config("ds_a100.json")
RATE = Rate(device="test", matmul_tflops=100, sampling_fraction=[(1, 0.2), (32, 0.4)], training_fraction=0.25, source="test")


@pytest.fixture(scope="module")
def model() -> Model:
    return published_model(CONFIG.seppo.model.path)


@pytest.fixture(scope="module")
def cost(model: Model) -> Cost:
    return estimate(model, CONFIG, batch_plan(CONFIG.deepspeed, 8))


@pytest.mark.parametrize(("gpus", "expected"), [
    (1, 0.0),
    (2, 0.5 * 10 / 100 / 0.5),  # half of 10 GB, at half of 100 GB/s
    (8, 7 / 8 * 10 / 100 / 0.5),
    (16, (7 / 8 * 10 / 100 + 1 / 2 * 10 / 40) / 0.5),
    (64, (7 / 8 * 10 / 100 + 7 / 8 * 10 / 40) / 0.5),
    (12, (7 / 8 * 10 / 100 + 1 / 2 * 10 / 40) / 0.5),  # a node and a half
])
def test_a_ring_within_nodes_and_one_between_them(gpus: int, expected: float) -> None:
    assert one_way(LINKS, gpus, 10 * GB) == pytest.approx(expected)


TRAINED, ALL = 1000, 5000
BF16, SUMS = {"bf16": {"enabled": True}}, {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, 2 * 4 * TRAINED),
    ({"zero_optimization": {"stage": 1}}, 2 * 4 * TRAINED + 4 * TRAINED),
    (BF16, 2 * 2 * TRAINED + 2 * TRAINED),  # stage 0 in half precision is run as stage 1
    (BF16 | SUMS | {"zero_optimization": {"stage": 1}}, 2 * 2 * TRAINED + 2 * TRAINED),
    (BF16 | SUMS | {"zero_optimization": {"stage": 1}, "communication_data_type": "fp32"}, 2 * 4 * TRAINED + 2 * TRAINED),
    (BF16 | {"zero_optimization": {"stage": 2}}, 4 * 2 * TRAINED + 2 * TRAINED),  # in each of 4 micro-batches
    (BF16 | {"zero_optimization": {"stage": 3}}, 4 * (2 * TRAINED + 2 * 2 * ALL)),
])
def test_what_an_update_sends(changes: dict[str, Any], expected: int, settings: Callable[..., dict[str, Any]], cost: Cost) -> None:
    """Of 1,000 trained weights of 5,000, with 4 micro-batches."""
    config = given_config(settings(train_batch_size=32, train_micro_batch_size_per_gpu=4, **changes), {})
    assert sent(config, batch_plan(config.deepspeed, 2), replace(cost, trained=TRAINED, parameters=ALL)) == expected


def shared(gpus: int, *changes: str) -> tuple[int, int, int, str]:
    found = fit(load_config("ds_a100.json", changes), gpus)
    assert found.batch is not None
    return found.share, found.batch.micro, found.batch.accumulation, found.note


def test_how_the_papers_batch_is_shared() -> None:
    assert shared(8) == (256, 8, 32, "")
    assert shared(256) == (8, 8, 1, "")
    assert shared(512) == (4, 4, 1, "with train_micro_batch_size_per_gpu=4")
    assert shared(2048) == (1, 1, 1, "with train_micro_batch_size_per_gpu=1")
    assert shared(48) == (43, 8, 6, "48 do not divide 2048, which is refused: 32 and 64 do")
    beyond = fit(CONFIG, 4096)
    assert beyond.batch is None
    assert beyond.note.startswith("2048 of them have no work: an update has 2048 pairs, so use at most 2048 GPUs")


def test_a_batch_that_grows_with_the_ranks(settings: Callable[..., dict[str, Any]]) -> None:
    raw = settings()
    del raw["train_batch_size"]
    found = fit(given_config(raw | {"gradient_accumulation_steps": 2}, {}), 512)
    assert (found.share, found.size, found.note) == (8, 4096, "4096 pairs an update")


def test_a_batch_of_three_keys(settings: Callable[..., dict[str, Any]]) -> None:
    raw = settings(train_batch_size=48, train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=3)
    assert fit(given_config(raw, {}), 4).note == "with train_micro_batch_size_per_gpu=6, gradient_accumulation_steps=2"


def whole_run(gpus: int, cost: Cost, config: Config = CONFIG) -> Hours:
    return hours_of(config, fit(config, gpus), cost, RATE, LINKS, written=720 * GB)


def test_hours_by_hand(cost: Cost) -> None:
    """On 64 GPUs: 32 pairs an update each, drawn at once; 210 updates; fp32 gradients of the weights twice, bf16 weights once."""
    found = whole_run(64, cost)
    pairs = 210 * 32
    assert (found.rollouts, found.batches) == (32, 1)
    assert found.sampling == pytest.approx(pairs * cost.sampling / 40e12 / 3600)
    assert found.training == pytest.approx(pairs * (cost.training + cost.scoring) / 25e12 / 3600)
    assert found.stragglers == pytest.approx(0.1 * (found.sampling + found.training))
    assert found.communication == pytest.approx(210 * 859_520_964 * 10 * 7 / 8 * (1 / 100e9 + 1 / 40e9) / 0.5 / 3600)
    assert found.writing == pytest.approx(720 / 4 / 3600)
    assert found.all == pytest.approx(found.sampling + found.training + found.stragglers + found.communication + found.writing)
    alone = whole_run(1, cost)
    assert alone.communication == alone.stragglers == 0 and alone.sampling == pytest.approx(64 * found.sampling)
    assert (alone.sampling, alone.training) == pytest.approx(hours(RATE, work_of(CONFIG, batch_plan(CONFIG.deepspeed, 1), cost)))


def test_few_rollouts_a_rank_are_drawn_in_smaller_batches(cost: Cost) -> None:
    """4 pairs a rank: at a batch of 4 the test's rate reaches 0.2 + 3 / 31 x 0.2."""
    found = whole_run(512, cost)
    assert (found.rollouts, found.batches) == (4, 1)
    assert found.sampling == pytest.approx(210 * 4 * cost.sampling / (100e12 * (0.2 + 3 / 31 * 0.2)) / 3600)
    ahead = whole_run(512, cost, load_config("ds_a100.json", ["seppo.sampler.window=iteration"]))
    assert (ahead.rollouts, ahead.batches) == (120, 4) and ahead.sampling < 0.7 * found.sampling


def test_the_busiest_rank_decides(cost: Cost) -> None:
    assert whole_run(48, cost).training == pytest.approx(43 / 32 * whole_run(64, cost).training)
    few = load_config("ds_a100.json", ["seppo.sampler.samples_per_iteration=30720"])
    assert (whole_run(64, cost, few).rollouts, whole_run(64, cost, few).batches) == (480, 15)
    assert whole_run(64, cost, load_config("ds_a100.json", ["seppo.method=sft"])).rollouts == 0


def test_all_that_is_written_counts() -> None:
    """7 checkpoints of which 4 are there at once, and 8 past policies."""
    parts = {"checkpoints": Part(10, 4, ""), "past policies": Part(3, 8, ""), "final/": Part(5, 1, "")}
    assert written_bytes(CONFIG, parts) == 7 * 10 + 8 * 3 + 5


def test_the_table(model: Model) -> None:
    text = gpus_plan(CONFIG, model, [8, 48, 512, 4096], load_rates(None))
    title, head, *rows = text.splitlines()
    assert "on more GPUs (NVIDIA A100): " in title and head.split() == [
        "GPUs", "pairs", "rollouts", "in", "all", "sampling", "training", "network", "stragglers", "disk", "memory", "a", "rank"]
    assert rows[0].split()[:9] == ["8", "256", "in", "32", "256", "in", "8", "11.4", "hours"]
    assert rows[1].split()[:7] == ["48", "43", "in", "6", "43", "in", "2"]
    assert rows[3].split() == ["4096", *"---------"]
    for words in ("48 GPUs: 48 do not divide 2048", "4096 GPUs: 2048 of them have no work", "300 GB/s a GPU within it",
                  "70% are reached", "published: NVLink of 600 GB/s a GPU"):
        assert words in text
    assert len({len(row) for row in (head, *rows[:4])}) == 1, "columns are aligned"


def test_memory_is_that_of_as_many_ranks(model: Model) -> None:
    rate, links = chosen(load_rates(None))
    for found, spent in plans(CONFIG, model, [8, 512], rate, links):
        assert found.batch is not None and spent is not None
        assert spent.memory == estimate(model, CONFIG, found.batch).reserved


def test_links_that_are_not_known_are_assumed_or_given(tmp_path: Path) -> None:
    own = RATE.model_dump() | {"device": "NVIDIA L40S"}
    assert chosen([Rate(**own), *load_rates(None)])[1].source.startswith("assumed: those of NVIDIA A100; published: ")
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"rates": own | {"cluster": LINKS.model_dump()}}))
    assert chosen(load_rates(str(file)))[1] == LINKS
    file.write_text(json.dumps({"rates": own | {"device": "NVIDIA A100-SXM4-80GB"}}))
    assert chosen(load_rates(str(file)))[1].link_gb_s == 300, "a measured A100 has an A100's links"
    file.write_text(json.dumps({"rates": own | {"cluster": LINKS.model_dump() | {"reached": 1.5}}}))
    with pytest.raises(UserError, match=r"rates.cluster.reached: expected a value less than or equal to 1 \(got 1.5\)"):
        load_rates(str(file))


def test_every_shipped_link_has_its_source() -> None:
    for name, rate in json.loads(SHIPPED.read_text()).items():
        assert rate["cluster"]["source"].startswith("published: ") and "assumed: " in rate["cluster"]["source"], name


@pytest.mark.parametrize("text", ["0", "-8", "8.5", "eight", "", "1" * 5000, "²", "٣"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--gpus .*: expected a number of GPUs, such as --gpus 8 64 512"):
        check_numbers(["8", text])


def test_numbers_are_shown_once_and_in_order() -> None:
    assert check_numbers(["64", "8", "64"]) == [8, 64]


def test_the_dry_run_shows_it_and_names_a_model_that_is_not_known(settings: Callable[..., dict[str, Any]]) -> None:
    config = given_config(settings(), {})
    assert "on more GPUs (NVIDIA A100)" in (said := dry_run(config, 1, gpus=["2", "16"])) and "8 of them have no work" in said
    assert "on more GPUs" not in dry_run(config, 1)
    unknown = given_config(settings(**{"seppo.model.path": "someone/something"}), {})
    assert "before you train: --gpus: nothing can be planned without the model's shape" in dry_run(unknown, 1, gpus=["2"])
