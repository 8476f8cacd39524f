"""What fits on a card: the search for the least change, and the table."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fits.__main__ import CASES, ways
from benchmarks.fits.readme import fits
from benchmarks.fits.search import Batches, Way, best
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
