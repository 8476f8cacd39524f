"""Curves, tables, verdicts and settings of what cheaper rollouts cost, from runs that were not made."""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import tiny_sd

from benchmarks.by_seed import Run, changed, open_work, result_file, unfinished
from benchmarks.intervals import Interval
from benchmarks.time_to_quality.__main__ import arguments, main, take_bases
from benchmarks.time_to_quality.comparisons import COMPARED, COSTS, NOTHING, OPEN, verdict
from benchmarks.time_to_quality.curves import at, at_equal_flops, curve, shares_until, until
from benchmarks.time_to_quality.distil import UNET, distil
from benchmarks.time_to_quality.diversity import Diversity
from benchmarks.time_to_quality.drawn import distances, energy, within_prompts
from benchmarks.time_to_quality.plots import front
from benchmarks.time_to_quality.readme import time_to_quality
from benchmarks.time_to_quality.report import end_table, judged, report, time_table
from benchmarks.time_to_quality.rollouts import Rollouts, label_of
from benchmarks.time_to_quality.runs import planned, spent_by
from benchmarks.time_to_quality.timed import seconds_of_updates
from benchmarks.time_to_quality.ways import (
    ADAPTER,
    BASE,
    DISTILLED,
    DRAWN,
    PAPER,
    SFT,
    TASKS,
    TIMED,
    Settings,
    drawn_like,
    judged_iterations,
    overrides,
)
from seppo_fast.configfile import load_config
from seppo_fast.errors import UserError
from seppo_fast.pictures import png
from seppo_fast.quickstart.digits import CAPTIONS, Digits
from seppo_fast.quickstart.models import KINDS
from seppo_fast.seeds import normal

COST = {PAPER: 100.0, "ddim_20": 41.0, "adapter": 6.0, "one_step": 3.0, SFT: 1.0}


def point(update: int, flops: float, quality: float) -> dict[str, float]:
    return {"update": update, "flops": flops, "seconds": 2 * flops, "sampling_s": flops, "training_s": 1.0,
            "prompt_accuracy": quality, "cleanliness": quality - 0.2, "vendi": 3.0}


def trained(seed: int, way: str, qualities: Sequence[float]) -> Run:
    return {"seed": seed, "method": way, "commit": "abc", "points": [
        point(16 * k, COST[way] * k / len(qualities), value + 0.03 * seed) | {"seconds": 999.0} for k, value in
        enumerate(qualities, 1)]}


def result(seeds: int = 3, **changes: list[float]) -> dict:
    """Cheap losers train as well as the paper's, but for `changes`."""
    ends = dict.fromkeys(COST, [0.6, 0.7, 0.8, 0.8]) | changes
    runs = []
    for seed in range(seeds):
        runs += [{"seed": seed, "method": BASE, "commit": "abc", "points": [point(0, 0.0, 0.5 + 0.03 * seed)]},
                 {"seed": seed, "method": DISTILLED, "commit": "abc", "points": [{"flops": 10.0, "seconds": 20.0}]},
                 {"seed": seed, "method": DRAWN, "commit": "abc", "samples": 300,
                  "points": [{way: COST["one_step"] / flops + 0.01 * seed for way, flops in COST.items() if way != SFT}]}]
        runs += [trained(seed, way, [value + 0.001 * seed * (way == "ddim_20") for value in values])
                 for way, values in ends.items()]
    runs.append({"seed": 0, "method": TIMED, "commit": "abc", "turns": 3, "busy": 0.98,
                 "points": [{"distillation_s": 20.0}], "obvious": {"a_prompt_a_call": 800 / 64, "a_batch_a_call": 300 / 64},
                 "updates": {way: {"sampling_s": flops / 64, "training_s": flops / 64} for way, flops in COST.items()}})
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


def test_seconds_are_those_of_the_timed_run_and_no_runs_own() -> None:
    some = result()
    assert [one["seconds"] for one in curve(some, PAPER, 1)] == [0, 50, 100, 150, 200]
    assert [one["seconds"] for one in curve(some, "adapter", 1, with_training=True)] == [0, 20, 23, 26, 29, 32]
    assert "3.12 s an update and 200 s in all" in report(some) and "98% of the time" in report(some)
    some["runs"] = [run for run in some["runs"] if run["method"] != TIMED]
    assert not any("seconds" in one for one in curve(some, "adapter", 1, with_training=True))
    text = report(some)
    assert "Seconds: not timed." in text and "| seconds" not in text and "obvious trainer" not in text
    for header, *lines in (table(some).splitlines() for table in (end_table, time_table)):
        assert all(line.count("|") == header.count("|") for line in lines)


def test_the_distance_of_rollouts_is_a_column_where_it_was_measured() -> None:
    some = result()
    found = {line.split(" | ")[0]: line.split(" | ")[-1] for line in end_table(some).splitlines()}
    assert found["| one unguided step"] == "1.010 ± 0.025 |" and found["| SFT"].strip(" |") == "" == found["| base"].strip(" |")
    some["runs"] = [run for run in some["runs"] if run["method"] != DRAWN]
    assert "distance" not in report(some).lower() and "Distance to the policy's own samples" in report(result())


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
    assert arguments([*work, "--task", "flow"]).methods == [*TASKS["flow"].ways, DRAWN, TIMED]
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


SMALL = Settings(sampler_steps=5, batch_size=4, updates=2)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A seed's folder with a tiny base, some pairs and an adapter."""
    monkeypatch.setattr("benchmarks.time_to_quality.distil.UNET", replace(UNET, batch_size=2, latents=4, teacher_steps=2))
    folder = tmp_path / "seed_0"
    schedule = tiny_sd(folder / "base") / "scheduler" / "scheduler_config.json"  # one step is possible as the quickstart spaces it
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"timestep_spacing": "trailing"}))
    pixels = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pq.write_table(pa.Table.from_pylist([
        {"jpg_0": png(pixels[i]), "jpg_1": png(1 - pixels[i]), "label_0": 1.0, "caption": CAPTIONS[i % 10]} for i in range(20)
    ]), folder / "pairs.parquet")
    distil(folder / "base", folder / ADAPTER, 0, steps=2)
    return folder


def test_every_way_and_the_obvious_trainer_are_timed(home: Path) -> None:
    found = seconds_of_updates(home, 0, SMALL, turns=2)
    updates, paper = found["updates"], found["updates"][PAPER]
    assert updates.keys() == TASKS["digits"].ways.keys() and found["turns"] == 1 and found["busy"] > 0
    assert updates["reuse_4"]["sampling_s"] == pytest.approx(paper["sampling_s"] / 4, abs=1e-5)
    assert all(each["sampling_s"] > 0 and each["training_s"] == paper["training_s"] > 0 for way, each in updates.items()
               if way != SFT)
    assert updates[SFT]["sampling_s"] == 0 < updates[SFT]["training_s"]
    assert found["obvious"].keys() == {"a_prompt_a_call", "a_batch_a_call"} and min(found["obvious"].values()) > 0
    assert {path.name for path in home.iterdir()} == {"base", "pairs.parquet", ADAPTER, "cache", "demonstrations", TIMED}


def test_rollouts_are_those_of_diffusers(home: Path) -> None:
    rollouts, numbers = Rollouts(home, 0, SMALL), [3, 14]
    pipeline = StableDiffusionPipeline.from_pretrained(home / "base")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline([CAPTIONS[label_of(number)] for number in numbers], height=16, width=16, num_inference_steps=5,
                      guidance_scale=2.0, latents=normal((4, 8, 8), 0, "initial noise", numbers), output_type="latent").images
    assert torch.allclose(rollouts.draw(rollouts.sampler(PAPER), numbers), theirs, atol=1e-4)
    assert rollouts.sampler("adapter").adapted and not rollouts.sampler(PAPER).adapted


def test_what_the_ways_draw_is_compared_with_other_samples_of_the_papers(home: Path) -> None:
    found = distances(home, 0, SMALL, samples=40)
    assert found.keys() == TASKS["digits"].ways.keys() - {SFT}
    assert found["reuse_2"] == found["reuse_4"] == found[PAPER] != 0
    assert found["one_step"] > abs(found[PAPER])
    assert len({*found.values()}) == len({*drawn_like(TASKS["digits"].ways).values()})


def test_the_energy_distance_is_zero_of_the_same_and_sees_the_prompt() -> None:
    random = torch.Generator().manual_seed(0)
    one, other = (torch.rand(400, 3, 16, 16, generator=random) for _ in range(2))
    for pictures in (one, other):
        pictures[::2] += 1
    labels = [number % 2 for number in range(400)]
    assert abs(within_prompts(one, other, labels)) < 0.02 and within_prompts(one, other.roll(1, 0), labels) > 1
    rows, others = (torch.randn(1000, 1, generator=random) for _ in range(2))
    assert abs(energy(rows, others)) < 0.01 and energy(rows, others + 3) == pytest.approx(6.03 - 4 / torch.pi**0.5, abs=0.2)
