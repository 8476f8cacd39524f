"""The benchmark of cheap rollouts, really run on a tiny model, and the table of hours that the plan gives for them."""

import json
import re
import shlex
from pathlib import Path

import pytest
from tiny import tiny_sd

from benchmarks.fits.hours import ways
from benchmarks.fits.readme import hours
from benchmarks.networks import lcm_lora
from benchmarks.readme.pages import CONFIGS, RESULTS
from benchmarks.throughput import rollouts
from seppo_fast.config import Sampler
from seppo_fast.configfile import given_config, load_config
from seppo_fast.models import open_model
from seppo_fast.models.published import published_model
from seppo_fast.sampling import DRAWN


def test_every_way_is_measured(tmp_path: Path) -> None:
    """On the CPU nothing is captured, so both draw the same. Two steps, of the adapter four; both of dpmsolver++ lie inside."""
    kept: list[dict] = []
    ways = {name: keys | ({"steps": 2} if "adapter" not in keys else {}) for name, keys in rollouts.WAYS.items()}
    rollouts.measure("cpu", kept.append, 60.0, open_model(str(tiny_sd(tmp_path / "sd"))), 16, 2, ways)
    rows = {row["way"]: row for row in kept[-1]["rows"]}
    assert rows.keys() == rollouts.WAYS.keys() and not kept[-1]["not_reached"]
    assert {name: row["calls"] for name, row in rows.items()} == {
        "these three": 3, "paper": 4, "adapter": 4, "fewer steps": 4, "interval": 3, "every second": 3}
    assert all(row["difference"] == 0 and row["captured_images_per_s"] > 0 for row in rows.values())


def test_the_ways_are_the_presets() -> None:
    fast = load_config("ds_a100_fast.json").seppo.sampler
    both = Sampler(**rollouts.WAYS["these three"])
    assert both.model_dump(include=DRAWN) == fast.model_dump(include=DRAWN)
    for way in ways():
        sampler = given_config(f"{way.configuration}.json", {f"seppo.sampler.{key}": value for key, value in way.changes.items()})
        assert sampler.seppo.sampler.model_dump().items() >= dict(way.changes).items(), way


def test_the_pages_command_with_an_adapter_is_right() -> None:
    (text,) = re.findall(r"^deepspeed .*ds_a100_fast.*$", CONFIGS.read_text().replace("\\\n", ""), re.MULTILINE)
    command = shlex.split(text)
    sampler = load_config("ds_a100_fast.json", command[command.index("--set") + 1:]).seppo.sampler
    assert (sampler.solver, sampler.steps, sampler.guidance_scale, sampler.limits) == ("lcm", 4, 1, [])


def test_the_adapter_is_as_large_as_the_lcm_lora() -> None:
    model = published_model("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert sum(value.numel() for value in lcm_lora(model).tensors.values()) == pytest.approx(67.5e6, rel=0.005)


def test_the_fast_preset_takes_a_third_of_the_papers_hours(tmp_path: Path) -> None:
    rows = {row["name"]: row for row in json.loads((RESULTS / "hours.json").read_text())["rows"]}
    paper, fast = rows["the paper's setting"], rows["these three"]
    assert paper["calls"] == 100 and rows["an LCM adapter, 4 steps"]["calls"] == 4
    assert fast["hours"] < 4 and paper["hours"] / fast["hours"] > 2.95
    assert "Not planned yet" in hours(tmp_path)
    assert f"| {paper['hours'] / fast['hours']:.1f}x |" in hours(RESULTS)


@pytest.mark.slow
def test_the_committed_hours_are_the_plans() -> None:
    from benchmarks.fits.hours import row_of

    committed = {row["name"]: row for row in json.loads((RESULTS / "hours.json").read_text())["rows"]}
    (way,) = [way for way in ways() if way.name == "these three"]
    assert row_of(way) == committed[way.name]
