"""What fits on a card: the search for the least change, and the table."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fits.__main__ import CASES, ways
from benchmarks.fits.ranks import cost_of, link_rate, predicted, summary
from benchmarks.fits.readme import fits, gpus, ranks
from benchmarks.fits.search import Batches, Way, best
from benchmarks.result_files import about
from seppo_fast.configfile import parse_config
from seppo_fast.models import open_model
from seppo_fast.planning.cost import Cost
from seppo_fast.planning.encoders import EncoderBytes

GB = 10**9
NOTHING = dict.fromkeys((
    "parameters", "trained", "forward", "sample", "improved", "per_pair", "training", "scoring", "reference", "optimizer",
    "gradients", "bucket", "update", "score", "kept_gradients", "adapter", "improver", "improving", "grid", "evaluation"), 0)
WHOLE, AS_IT_IS, CHECKPOINTING = Batches(8, 8, 8), Way((), ()), Way(("checkpointing",), ("x=true",))


@pytest.fixture
def cost() -> Callable[[Way, Batches], Cost]:
    """12 GB of weights; 4 GB a pair, or 1 with checkpoints; 0.5 GB a sample; 1 GB an image that is encoded."""
    def of(way: Way, batches: Batches) -> Cost:
        encoders = EncoderBytes(vae=0, encoding=batches.encoded * GB, decoding=0, text=20 * GB, embedding=0, looking=0)
        return Cost(**NOTHING, weights=12 * GB, activations=(1 if way.labels else 4) * batches.micro * GB,
                    sampler=batches.samples * GB // 2, encoders=encoders, graph=True, offloads=False, offloads_improver=False)
    return of


def test_a_configuration_that_fits_is_left_alone(cost: Callable[[Way, Batches], Cost]) -> None:
    found = best(80, [AS_IT_IS, CHECKPOINTING], WHOLE, cost)
    assert found == {"fits": True, "labels": [], "micro": 8, "samples": 8, "encoded": 8, "bytes": (12 + 32 + 4) * GB}


def test_the_largest_batches_that_fit_are_taken_pairs_first(cost: Callable[[Way, Batches], Cost]) -> None:
    """40 GiB of which 90 % are 38.65 GB: 12 of weights, 4 pairs of 4 GB, and 8 samples of 0.5 GB, whose graph stays."""
    found = best(40, [AS_IT_IS, CHECKPOINTING], WHOLE, cost)
    assert (found["labels"], found["micro"], found["samples"], found["bytes"]) == ([], 4, 8, 32 * GB)


def test_memory_is_saved_where_one_pair_does_not_fit(cost: Callable[[Way, Batches], Cost]) -> None:
    def heavy(way: Way, batches: Batches) -> Cost:
        return replace(cost(way, batches), weights=19 * GB)

    found = best(24, [AS_IT_IS, CHECKPOINTING], WHOLE, heavy)
    assert (found["fits"], found["labels"], found["micro"], found["samples"]) == (True, ["checkpointing"], 2, 4)
    found = best(24, [AS_IT_IS], WHOLE, heavy)
    assert not found["fits"] and found["phase"] == "micro-batch" and found["bytes"] == 23 * GB


def test_text_encoders_that_do_not_fit_are_named(cost: Callable[[Way, Batches], Cost]) -> None:
    def large(way: Way, batches: Batches) -> Cost:
        found = cost(way, batches)
        return replace(found, weights=0, encoders=replace(found.encoders, text=33 * GB))

    assert best(24, [AS_IT_IS, CHECKPOINTING], WHOLE, large)["phase"] == "encoding"


def test_a_full_training_may_become_a_lora() -> None:
    """And every case is a configuration that can be read with all its changes."""
    assert ways("ds_a100", [])[2].labels == ("checkpointing", "LoRA of rank 16")
    assert all("LoRA of rank 16" not in way.labels for way in ways("ds_a100_flux", []))
    assert all(ways(name, changes)[0] == AS_IT_IS for name, changes in CASES.values())


def test_the_table(tmp_path: Path) -> None:
    assert "Not planned yet" in fits(tmp_path)
    yes = {"fits": True, "labels": ["checkpointing"], "micro": 2, "samples": 4, "encoded": 8, "bytes": 22 * GB}
    no = {"fits": False, "labels": [], "phase": "encoding", "bytes": 33 * GB}
    row = {"name": "A model", "configuration": "a.json", "changes": [], "resolution": 480, "frames": 49, "parameters": 1.4e9,
           "bytes": 31 * GB, "cards": {"24": no, "40": yes, "80": yes}}
    (tmp_path / "fits.json").write_text(json.dumps({"rows": [row], "commit": "abc", "versions": {"diffusers": "1"}}))
    assert ("| A model, 1.4 B, 480 pixels, 49 frames (`a.json`) | 31 GB | no: encoding 33 GB | 2 and 4, 22 GB; checkpointing |"
            in fits(tmp_path))


def test_the_predicted_ratio_of_two_ranks(settings: Callable[..., dict], sd: Path) -> None:
    """Of 3 s sampling and 1 s training an update, two ranks take half and 5% of it, and the time of the gradients' bytes once."""
    raw = settings(train_batch_size=64, train_micro_batch_size_per_gpu=64)
    config, model, one = parse_config(raw), open_model(str(sd)), {"sampling": 3.0, "training": 1.0}
    assert predicted(config, model, one, link=1e9, stragglers=0.05) == pytest.approx(2 / 1.05)
    size = 4 * cost_of(config, model, 1).trained
    assert predicted(config, model, one, link=size / 0.9 / 1e9, stragglers=0.3) == pytest.approx(4 / (2 * 1.3 + 0.9))


@pytest.mark.slow
def test_the_rate_of_a_link_is_measured() -> None:
    assert 0.001 < link_rate(4_000_000) < 1000


def test_the_table_of_ranks(tmp_path: Path) -> None:
    assert ranks(tmp_path).startswith("Not measured yet (`python -m benchmarks.fits.ranks")
    rows = [{"ranks": count, "update": 3, "seconds": seconds, "sampling": 0.5 * seconds, "training": 0.25 * seconds}
            for count, seconds in ((1, 2.0), (1, 4.0), (1, 9.0), (2, 2.0))]
    result = about("cpu") | {"ranks": [summary(rows, 1), summary(rows, 2)], "measured": 2.0, "predicted": 1.8, "apart": -0.1,
                             "updates": 3, "rounds": 1, "gradient_bytes": 4_000_000, "link_gb_s": 1.5, "slower_at_once": 0.11,
                             "predicted_with_assumed_stragglers": 1.9}
    (tmp_path / "ranks_cpu.json").write_text(json.dumps(result))
    said = ranks(tmp_path)
    assert "| 1 | 4.000 | 2.000 | 1.000 |" in said
    assert "2.00 times as fast as one, and by the plan 1.80 times: -10.0% (at most 15%: met)" in said
    (tmp_path / "ranks_cpu.json").write_text(json.dumps(result | {"apart": 0.2}))
    assert "**missed**" in ranks(tmp_path)


def test_the_table_of_gpus(tmp_path: Path) -> None:
    assert gpus(tmp_path).startswith("Not planned yet (`python -m benchmarks.fits.gpus")
    spent = {"sampling": 1.5, "training": 0.25, "communication": 0.05, "stragglers": 0.1, "writing": 0.1, "memory": 2 * 10**10,
             "rollouts": 32, "batches": 1, "all": 2.0}
    rows = [{"gpus": 64, "share": 32, "accumulation": 4, "note": "", "in_all": "2 hours", "hours": spent},
            {"gpus": 4096, "share": 0, "accumulation": None, "note": "no work", "in_all": None, "hours": None}]
    result = {"commit": "c", "versions": {"diffusers": "1"}, "configuration": "x.json", "pairs": 64, "device": "an A100",
              "assumptions": ["  8 GPUs a node", "  published: a data sheet"], "rows": rows}
    (tmp_path / "gpus.json").write_text(json.dumps(result))
    said = gpus(tmp_path)
    assert "| 64 | 32 in 4 | 32 in 1 | 2 hours | 75.0% | 12.5% | 2.5% | 5.0% | 5.0% | 20 GB |" in said
    assert "| 4096 | - | - | - | - | - | - | - | - | - |" in said and "- 4096 GPUs: no work" in said
    assert said.endswith("drawn in so many batches. 8 GPUs a node; published: a data sheet.")
    assert len({line.count("|") for line in said.splitlines() if line.startswith("|")}) == 1
