"""Curves, tables, verdicts and settings of what cheaper rollouts cost, from runs that were not made."""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from tiny import tiny_sd

from benchmarks.by_seed import Run, changed, open_work, result_file, unfinished
from benchmarks.intervals import Interval
from benchmarks.time_to_quality.__main__ import arguments, main, take_bases
from benchmarks.time_to_quality.comparisons import COMPARED, COSTS, NOTHING, OPEN, verdict
from benchmarks.time_to_quality.curves import at, at_equal_flops, curve, shares_until, until
from benchmarks.time_to_quality.diversity import Diversity
from benchmarks.time_to_quality.plots import front
from benchmarks.time_to_quality.readme import time_to_quality
from benchmarks.time_to_quality.report import end_table, judged, report, time_table
from benchmarks.time_to_quality.runs import planned, spent_by
from benchmarks.time_to_quality.ways import BASE, DISTILLED, OBVIOUS, PAPER, SFT, TASKS, Settings, judged_iterations, overrides
from seppo_fast.configfile import load_config
from seppo_fast.errors import UserError
from seppo_fast.quickstart.digits import Digits
from seppo_fast.quickstart.models import KINDS

COST = {PAPER: 100.0, "ddim_20": 41.0, "adapter": 6.0, "one_step": 3.0, SFT: 1.0}


def point(update: int, flops: float, quality: float) -> dict[str, float]:
    return {"update": update, "flops": flops, "seconds": 2 * flops, "sampling_s": flops, "training_s": 1.0,
            "prompt_accuracy": quality, "cleanliness": quality - 0.2, "vendi": 3.0}


def trained(seed: int, way: str, qualities: Sequence[float]) -> Run:
    return {"seed": seed, "method": way, "commit": "abc", "points": [
        point(16 * k, COST[way] * k / len(qualities), value + 0.03 * seed) for k, value in enumerate(qualities, 1)]}


def result(seeds: int = 3, **changes: list[float]) -> dict:
    """Cheap losers train as well as the paper's, but for `changes`."""
    ends = dict.fromkeys(COST, [0.6, 0.7, 0.8, 0.8]) | changes
    runs = []
    for seed in range(seeds):
        runs += [{"seed": seed, "method": BASE, "commit": "abc", "points": [point(0, 0.0, 0.5 + 0.03 * seed)]},
                 {"seed": seed, "method": DISTILLED, "commit": "abc", "points": [{"flops": 10.0, "seconds": 20.0}]},
                 {"seed": seed, "method": OBVIOUS, "commit": "abc",
                  "points": [{"update": 64, "a_prompt_a_call_s": 800.0, "a_batch_a_call_s": 300.0}]}]
        runs += [trained(seed, way, [value + 0.001 * seed * (way == "ddim_20") for value in values])
                 for way, values in ends.items()]
    return {"machine": {"cpu": "Some CPU"}, "versions": {"torch": "2.99"}, "seconds": {"processor": 120}, "runs": runs,
            "commits_of_runs": ["abc"], "settings": vars(Settings()) | {"seeds": seeds, "side_by_side": 2}}


def test_a_curve_is_read_between_its_policies() -> None:
    points = [point(0, 0, 0.5), point(8, 10, 0.6), point(16, 20, 0.8), point(24, 30, 0.7)]
    assert at(points, 15, "prompt_accuracy") == pytest.approx(0.7) and at(points, 99, "prompt_accuracy") == 0.7
    assert until(points, 0.7, "prompt_accuracy", "flops") == pytest.approx(15)
    assert until(points, 0.7, "prompt_accuracy", "seconds") == pytest.approx(30)
    assert until(points, 0.4, "prompt_accuracy", "flops") == 0 and until(points, 0.9, "prompt_accuracy", "flops") == inf


def test_equal_flops_are_where_the_cheap_one_ends_and_at_most_half_of_the_papers() -> None:
    some = result()
    # one step ends at 3 FLOPs, where the paper's curve has gone 3/25 of the way from the base's 0.5 to 0.6
    assert at_equal_flops(some, "one_step", "prompt_accuracy") == pytest.approx([0.8 - 0.512] * 3)
    # at 16 the adapter has been trained (10) and has trained (6), and the paper's curve stands at 0.564
    assert at_equal_flops(some, "adapter", "prompt_accuracy", with_training=True) == pytest.approx([0.8 - 0.564] * 3)
    assert at_equal_flops(some, PAPER, "cleanliness") == pytest.approx([0.0] * 3)
    assert [one["flops"] for one in curve(some, "adapter", 0, with_training=True)] == [0, 10, 11.5, 13, 14.5, 16]


def test_what_is_reached_is_where_the_same_seeds_paper_ends() -> None:
    some = result(one_step=[0.6, 0.65, 0.7, 0.75])
    assert shares_until(some, "ddim_20", "cleanliness", "flops") == pytest.approx([0.3075, 0.3065, 0.3055], abs=2e-3)
    assert shares_until(some, "one_step", "cleanliness", "flops") == [inf] * 3
    row = next(line for line in time_table(some).splitlines() if line.startswith("| one unguided step"))
    assert row.count("not reached") == 4 and row.count("0/3") == 2


@pytest.mark.parametrize(("found", "said"), [
    ([Interval(-0.03, 0.02), Interval(0.1, 0.02)], COSTS), ([Interval(-0.01, 0.03), Interval(0.0, 0.04)], NOTHING),
    ([Interval(-0.01, 0.03), Interval(0.0, 0.06)], OPEN), ([Interval(0.2, 0.01), Interval(0.1, 0.01)], NOTHING),
    ([Interval(0.0, None), Interval(0.0, None)], OPEN)])
def test_the_worst_measure_decides(found: list[Interval], said: str) -> None:
    assert verdict(found) == said


def test_poor_losers_that_cost_nothing_are_not_said_to_be_free_everywhere() -> None:
    assert "where losers do not matter" in report(result()).replace("\n", " ")
    text = report(result(one_step=[0.55, 0.6, 0.7, 0.7]))
    assert "So losers matter here" in text and "- Costs quality (an interval lies below zero): one unguided step." in judged(
        result(one_step=[0.55, 0.6, 0.7, 0.7]))
    assert "So these seeds do not tell" in report(result(seeds=1)) and "±" not in end_table(result(seeds=1))


def test_the_adapter_is_shown_with_and_without_its_training() -> None:
    rows = [line.split(" | ")[:3] for line in end_table(result()).splitlines() if "LoRA" in line]
    assert rows == [["| consistency LoRA, 4 LCM steps", "6.0%", "6.0%"],
                    ["| consistency LoRA, 4 LCM steps, its own training counted", "16.0%", "16.0%"]]
    header, *lines = end_table(result()).splitlines()
    assert all(line.count("|") == header.count("|") for line in lines)
    assert "800 s with a prompt a call (4x), 300 s with a batch a call (1.5x)" in report(result())


def test_the_block_and_the_front(tmp_path: Path) -> None:
    assert time_to_quality(tmp_path, "flow").startswith("Not measured yet (`python -m benchmarks.time_to_quality --task flow")
    (tmp_path / "time_to_quality_digits.json").write_text(json.dumps(result()))
    assert time_to_quality(tmp_path, "digits").endswith("(results/time_to_quality_digits.png)")
    front(tmp_path / "front.png", result())
    assert (tmp_path / "front.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", TASKS)
def test_every_way_is_a_run_of_the_trainer_and_is_compared(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    assert (PAPER, *COMPARED[name]) == tuple(task.ways)
    found = {way: load_config(KINDS[task.settings.model].config, overrides(tmp_path, 3, way, task.settings)).seppo
             for way in task.ways}
    paper = found[PAPER].model_dump()
    assert found[PAPER].sampler.steps == 50 and found[PAPER].seed == 3
    for way, ours in found.items():
        differing = {key for key, value in ours.model_dump().items() if paper[key] != value} - {"output_dir"}
        assert differing <= ({"sampler"} if way != SFT else {"method", "reference", "flipper", "checkpoint"})
    pairs = task.settings.batch_size * task.settings.updates
    for way, ours in found.items():
        times = task.ways[way].reuse
        assert ours.sampler.samples_per_iteration == (pairs // times if times > 1 else None)


def test_flops_are_those_of_the_plan(tmp_path: Path) -> None:
    tiny_sd(tmp_path / "seed_0" / "base")
    found = {way: planned("quickstart.json", overrides(tmp_path, 0, way, Settings())) for way in (PAPER, "ddim_20", "reuse_2", SFT)}
    paper = found[PAPER]
    assert paper.sampling == 100 * paper.forward and paper.pair == paper.sampling + paper.training + paper.scoring
    assert (found["ddim_20"].sampling, found["reuse_2"].sampling) == (40 * paper.forward, 50 * paper.forward)
    assert found[SFT].pair < 0.6 * (paper.training + paper.scoring) and found["reuse_2"].training == paper.training


def test_seconds_add_up_over_updates() -> None:
    rows = [{"update": k, "seconds": 2.0, "seconds_sampling": 1.5, "seconds_training": 0.25} for k in (1, 2)]
    assert spent_by(rows) == {1: {"seconds": 2.0, "sampling_s": 1.5, "training_s": 0.25},
                              2: {"seconds": 4.0, "sampling_s": 3.0, "training_s": 0.5}}


def test_the_last_policy_is_judged(tmp_path: Path) -> None:
    assert judged_iterations(Settings(iterations=8, judged_every=3)) == [2, 5, 8]
    work = ["--out", str(tmp_path), "--work", str(tmp_path / "work")]
    assert main([*work, "--set", "judged_every=8"]) == 2 and main([*work, "--task", "flow", "--methods", "every_2"]) == 2
    assert arguments([*work, "--task", "flow", "--methods", "sft"]).methods == [PAPER, SFT]
    assert changed(TASKS["flow"].settings, ["beta=5"]).task == "flow"


def test_bases_and_their_adapters_are_taken_where_they_fit(tmp_path: Path) -> None:
    earlier, now, settings = tmp_path / "earlier", tmp_path / "now", Settings()
    for work in (earlier, now):
        open_work(work, settings)
    for seed, names in ((0, (BASE, DISTILLED)), (1, (BASE,)), (2, ())):
        (earlier / f"seed_{seed}").mkdir()
        for name in names:
            result_file(earlier, seed, name).write_text("{}")
    take_bases(now, earlier, range(3), settings)
    assert unfinished(now, range(2), [BASE, DISTILLED]) == [(0, BASE), (1, BASE), (1, DISTILLED)]  # bases are judged anew
    assert (now / "seed_0" / "adapter").is_symlink() and not (now / "seed_2").exists()
    with pytest.raises(UserError, match="guidance_scale 2.0 there, 5.0 now"):
        take_bases(now, earlier, [0], replace(settings, guidance_scale=5.0))


def test_many_different_pictures_are_more_diverse_than_copies() -> None:
    random = torch.Generator().manual_seed(0)
    real = Digits(torch.rand(40, 3, 16, 16, generator=random), torch.arange(40) % 2)
    diversity, labels = Diversity(real), [0, 1] * 20
    copies = real.pixels[:2].repeat(20, 1, 1, 1)
    assert diversity.within_prompts(copies, labels) == pytest.approx(1)
    assert diversity.within_prompts(real.pixels, labels) > 3
