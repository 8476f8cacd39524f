"""The throughput benchmark's pieces, really run on something tiny; what it says of its figures."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import jobs, networks
from benchmarks.result_files import Row
from benchmarks.throughput import loop, micro_batch, ranks, samplers, swap
from benchmarks.throughput.__main__ import others
from benchmarks.throughput.loop import Case
from benchmarks.throughput.obvious_trainer import ObviousTrainer
from benchmarks.throughput.readme import throughput
from benchmarks.throughput.summary import rates, targets
from seppo_fast.planning.time_plan import load_rates


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters", "tflop"), [("sd15", 859_520_964, 0.803), ("sdxl", 2_567_463_684, 6.76),
                                                           ("animatediff", 1_312_730_244, 4.106),
                                                           ("quickstart", 985_444, 4.48e-5)])
def test_networks_have_the_published_sizes_and_flops_are_counted_twice_alike(name: str, parameters: int, tflop: float) -> None:
    assert sum(weight.numel() for weight in networks.make_unet(name, "meta", torch.float32).parameters()) == parameters
    flops = networks.own_flops(name)
    assert flops == networks.counted_flops(name)
    assert flops / 1e12 == pytest.approx(tflop, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True])
def test_the_obvious_trainer_trains(sd: Path, demonstrations: Path, batched: bool) -> None:
    torch.manual_seed(0)
    trainer = ObviousTrainer(sd, demonstrations, "cpu", resolution=16, steps=2, guidance=2.0, micro=2, beta=2000.0, lr=1e-3,
                             batched=batched)
    assert trainer.update(4) == pytest.approx(math.log(2), abs=1e-5), "the policy is its reference, and every logit 0"
    assert trainer.update(4) != pytest.approx(math.log(2), abs=1e-3)
    moved = [not torch.equal(a, b) for a, b in zip(trainer.policy.parameters(), trainer.reference.parameters(), strict=True)]
    assert all(moved)
    assert all(seconds > 0 for seconds in trainer.seconds.values())


@pytest.fixture
def case(sd: Path, demonstrations: Path, tmp_path: Path) -> Case:
    return Case("tiny", sd, demonstrations, tmp_path, "quickstart.json", steps=2, batch=4, micro=4, warm_up=1, updates=(2, 1),
                rounds=1, batched=False)


@pytest.mark.slow
def test_both_trainers_are_timed_by_their_commands(case: Case) -> None:
    kept: list[Row] = []
    loop.measure(case, kept.append)
    assert [len(result["rows"]) for result in kept] == [1, 2], "what there is is kept after each run"
    rows = {row["trainer"]: row for row in kept[-1]["rows"]}
    assert rows["ours"]["updates"] == 2 and rows["obvious"]["updates"] == 1
    rates = {name: row["pairs_per_s"] for name, row in rows.items()}
    assert kept[-1]["pairs_per_s"] == rates
    assert kept[-1]["ours_over_obvious"] == pytest.approx(rates["ours"] / rates["obvious"], abs=0.01)
    assert all(row["sampling_s"] > 0 and row["training_s"] > 0 for row in rows.values())


def test_a_trainer_that_fails_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match="ended with status 3:\nlast words"), log.open("w") as file:
        jobs.finish(subprocess.Popen([sys.executable, "-c", "print('last words'); raise SystemExit(3)"], stdout=file), log)


@pytest.mark.slow
def test_two_ranks_are_counted(case: Case) -> None:
    jobs = ranks.run_ranks(replace(case, micro=2), 2)
    assert [job["samples"] for job in jobs] == [[2, 2, 2], [2, 2, 2]]
    rows = [{"ranks": 1, "pairs_per_s": 10.0, "samples_a_rank": [[4]]},
            {"ranks": 2, "pairs_per_s": 17.0, "samples_a_rank": [job["samples"][:1] for job in jobs]}]
    assert ranks.summary(rows)["two_over_one"] == 1.7 and ranks.summary(rows)["shared_evenly"]
    rows[1]["samples_a_rank"] = [[1], [3]]
    assert not ranks.summary(rows)["shared_evenly"]


@pytest.mark.slow
def test_the_sampler_is_timed_beside_diffusers_and_agrees_with_it() -> None:
    kept: list[Row] = []
    points = [("quickstart", 2, 3, ("ours", "diffusers_eager")), ("quickstart", 1, 3, ("ours",))]
    samplers.measure("cpu", kept.append, seconds=100, repeats=0.01, points=points)
    result = kept[-1]
    assert result["difference"]["quickstart"] < 1e-4
    assert [(row["batch"], row["way"]) for row in result["rows"]] == [(2, "ours"), (2, "diffusers_eager"), (1, "ours")]
    for row in result["rows"]:
        share = 2 * 3 * row["images_per_s"] * result["flops"]["quickstart"]["own"] / (1e12 * result["matmul_tflops"])
        assert row["of_matmul"] == pytest.approx(share, rel=0.02, abs=1e-4)
    assert result["ratios"][0]["over_diffusers_eager"] > 0 and "over_diffusers" not in result["ratios"][0]
    samplers.measure("cpu", kept.append, seconds=0, repeats=0.01, points=points[:1])
    assert kept[-1]["not_reached"] == ["quickstart batch 2, 3 steps: ours, diffusers_eager"]


@pytest.mark.slow
def test_the_video_sampler_agrees_with_diffusers_pipeline() -> None:
    assert samplers.difference("tiny_video", "cpu") < 1e-4


def test_swaps_bring_every_byte(tmp_path: Path) -> None:
    kept: list[Row] = []
    swap.measure("quickstart", "cpu", tmp_path, kept.append, repeats=1)
    assert [row["from"] for row in kept[-1]["rows"]] == ["host memory", "disk"]
    assert {row["bytes"] for row in kept[-1]["rows"]} == {4 * 985_444}
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


@pytest.mark.slow
def test_a_micro_batch_is_timed_and_its_calls_are_counted() -> None:
    kept: list[Row] = []
    micro_batch.measure("cpu", kept.append, seconds=100, repeats=0.01, ways=["none"])
    row, = kept[-1]["rows"]
    assert (row["network"], row["pairs"], row["compile"]) == ("quickstart", 1, "none")
    assert 1e3 * row["first_s"] >= row["ms"] / 2 > 0 and row["calls"] > 2000
    micro_batch.measure("cpu", kept.append, seconds=0)
    assert len(kept) == 1, "none is begun when the time is over"


def cpu_result(**changes: float) -> Row:
    """What `python -m benchmarks.throughput` writes on the CPU."""
    ratio = changes.get("ratio", 4.0)
    phases = {"sampling_s": 1.0, "data_s": 0.1, "training_s": 0.5, "peak_gb": 2.0}
    return {"machine": {"cpu": "Some CPU", "cores": 4, "threads": 2}, "versions": {"torch": "2.99"}, "commit": "abc",
            "loop": {"case": {"name": "quickstart", "steps": 8, "batch": 64, "micro": 64}, "load_average": [0.1, 1.9],
                     "pairs_per_s": {"obvious": 10.0, "ours": 10 * ratio}, "ours_over_obvious": ratio,
                     "rows": [{"trainer": "obvious", **phases}, {"trainer": "ours", **phases}]},
            "ranks": {"pairs_per_s": {"1": 30.0, "2": 51.0}, "two_over_one": 1.7, "shared_evenly": True},
            "sampler": {"matmul_tflops": 0.1, "flops": {"quickstart": {"own": 44_761_088}},
                        "ratios": [{"network": "quickstart", "batch": 64, "steps": 20, "best": "ours", "images_per_s": 12.3,
                                    "of_matmul": 0.3, "over_diffusers": 1.1}]},
            "swap": {"rows": [{"network": "quickstart", "from": "disk", "bytes": 3_900_000, "seconds": 0.004, "gb_s": 1.0}]}}


def test_parts_that_are_measured_alone_keep_the_others_with_their_commit(tmp_path: Path) -> None:
    earlier, now = cpu_result(), {"machine": {"cpu": "Some CPU"}, "versions": {"torch": "2.99"}, "commit": "def"}
    kept = others(earlier, now, ["loop", "sampler", "profile"])
    assert kept == {"loop": {"commit": "abc"} | earlier["loop"], "sampler": {"commit": "abc"} | earlier["sampler"]}
    assert others(now | kept, now | {"commit": "ghi"}, ["loop"])["loop"]["commit"] == "abc"
    assert others(earlier, now | {"versions": {"torch": "3"}}, ["loop"]) == others({}, now, ["loop"]) == {}
    assert others(earlier, now | {"machine": {"cpu": "Another"}}, ["loop"]) == {}
    result = cpu_result() | {"commit": "def", "loop": kept["loop"]}
    (tmp_path / "throughput_cpu.json").write_text(json.dumps(result))
    assert ", commit `def`; loop of commit `abc`, load average" in throughput(tmp_path)


def test_targets_are_met_missed_or_not_measured() -> None:
    verdicts = [target["met"] for target in targets(cpu_result(), "cpu")]
    assert verdicts == [True, True, True]
    assert targets(cpu_result(ratio=1.99), "cpu")[0]["met"] is False
    assert [target["met"] for target in targets({}, "cuda")] == [None] * 6
    memory = {"training_memory": {"rows": [{"way": "full", "measured_gb": 20.0, "planned_gb": 16.0, "planned_over_measured": 0.8}]}}
    judged = {target["target"]: target for target in targets(memory, "cuda")}
    assert [target["met"] for target in judged.values()] == [None, None, None, True, None, False]
    ratios = [{"network": "sd15", "steps": 50, "batch": batch, "of_matmul": share, "over_diffusers": over}
              for batch, share, over in ((1, 0.2, 1.19), (64, 0.55, 1.3))]
    sampler = targets({"sampler": {"ratios": ratios}}, "cuda")
    assert (sampler[1]["met"], sampler[1]["where"]) == (False, "sd15, batch 1, 50 steps")
    assert (sampler[2]["met"], sampler[2]["where"]) == (True, "sd15, batch 64, 50 steps")


def test_the_dry_run_reads_the_rates(tmp_path: Path) -> None:
    assert rates({"machine": {}}) is None
    result = cpu_result()
    file = tmp_path / "throughput.json"
    file.write_text(json.dumps(result | {"rates": rates(result)}))
    rate = load_rates(str(file))[0]
    assert (rate.device, rate.matmul_tflops, rate.sampling_fraction) == ("Some CPU", 0.1, [(64, 0.3)])
    assert rate.training_fraction == [(64, round(8 * 64 * 44_761_088 / 0.5 / 1e11, 4))]


def test_the_readme_block_has_the_measured_figures(tmp_path: Path) -> None:
    assert throughput(tmp_path).count("not measured yet") == 2
    (tmp_path / "throughput_cpu.json").write_text(json.dumps(cpu_result()))
    text = throughput(tmp_path)
    for line in ("| ours | 40.00 | - | 1.00 | 0.10 | 0.50 | 2.00 |",
                 "| obvious, a prompt a call | 10.00 | 4.00x | 1.00 | 0.10 | 0.50 | 2.00 |",
                 "| quickstart, 20, 64 | 12.3 | 30.0% | - | 1.10x |", "- the loop at least 2x the obvious trainer: met, 4 (8 steps,"
                 " batch 64)", "Another reference, 3.9 MB of quickstart: 4 ms from disk (1.0 GB/s)."):
        assert line in text.splitlines(), text
    assert "On Some CPU, 2 of 4 cores, torch 2.99, commit `abc`, load average 0.1 to 1.9;" in text
    assert text.count("not measured yet") == 1
    rows = [{"network": "sd15", "pairs": 1, "compile": "full", "ms": 41.26, "calls": 900, "launches": 850, "idle": 0.114,
             "first_s": 70}]
    suite = {"machine": {"gpu": "Some GPU", "torch": "2.99"}, "commit": "abc", "sampler": {"outcome": "stopped after 9 s"},
             "micro_batch": {"rows": rows}}
    (tmp_path / "gpu_suite_some.json").write_text(json.dumps(suite))
    assert "| sd15, 1 | full | 41.3 | 900 | 11% of the time, 850 launches | 70.0 |" in throughput(tmp_path)
    assert "On Some GPU, torch 2.99" in throughput(tmp_path) and "training in less than 24 GB" in throughput(tmp_path)
