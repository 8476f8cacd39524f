"""The improvement quickstart: pairs, judge, report and configurations; its base, hardly trained."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from seppo_fast.configfile import batch_plan, load_config
from seppo_fast.quickstart.digits import CAPTIONS, Digits, split_digits
from seppo_fast.quickstart.improvement.base import make_base, recipe_of
from seppo_fast.quickstart.improvement.judge import Judge, Scores, improve
from seppo_fast.quickstart.improvement.pairs import GAIN, LEAST, degrade_to, make_pairs, write_pairs
from seppo_fast.quickstart.improvement.report import table, write_result
from seppo_fast.quickstart.improvement.run import STAGES
from seppo_fast.quickstart.judge import draw
from seppo_fast.quickstart.report import grids
from seppo_fast.quickstart.steps import overrides
from seppo_fast.seeds import generator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    return split_digits(0)


@pytest.fixture(scope="module")
def judge(digits: tuple[Digits, Digits]) -> Judge:
    return Judge(digits[1])


def at(digits: Digits, level: float) -> torch.Tensor:
    return degrade_to(digits.pixels, torch.full((len(digits),), level), generator("test"))


def test_levels_take_contrast_and_add_grain(digits: tuple[Digits, Digits]) -> None:
    learnt = digits[0]
    assert torch.equal(at(learnt, 0.0), learnt.pixels)
    faint = at(learnt, 1.0)
    assert 0 <= faint.min() and faint.max() <= 1
    sharp, flat = learnt.pixels.mean(0), faint.mean(0)
    assert (flat.max() - flat.min()) / (sharp.max() - sharp.min()) == pytest.approx(0.3, abs=0.05)
    assert not torch.equal(faint[0], faint[1])


def test_winners_are_less_degraded_than_losers_of_the_same_digit(digits: tuple[Digits, Digits]) -> None:
    pairs = make_pairs(digits[0], 0, copies=2)
    gains = pairs.loser_levels - pairs.winner_levels
    assert len(pairs.winners) == 2 * len(digits[0]) and torch.equal(pairs.winners.labels, pairs.losers.labels)
    assert LEAST <= pairs.loser_levels.min() and pairs.loser_levels.max() <= 1 and pairs.winner_levels.min() == 0
    assert gains.max() <= GAIN[1] + 1e-6 and gains[pairs.winner_levels > 0].min() >= GAIN[0] - 1e-6
    means = [levels.mean().item() for levels in (pairs.loser_levels, pairs.winner_levels)]
    assert means == pytest.approx([0.65, 0.38], abs=0.02)
    assert torch.equal(make_pairs(digits[0], 0, 2).losers.pixels, pairs.losers.pixels)
    assert not torch.equal(make_pairs(digits[0], 1, 2).loser_levels, pairs.loser_levels)


def test_the_parquet_names_the_winner(digits: tuple[Digits, Digits], tmp_path: Path) -> None:
    from io import BytesIO

    few = Digits(digits[0].pixels[:6], digits[0].labels[:6])
    pairs = make_pairs(few, 0, 1)
    assert write_pairs(tmp_path / "new" / "pairs.parquet", pairs) == 6
    rows = pq.read_table(tmp_path / "new" / "pairs.parquet").to_pylist()
    assert {row["label_0"] for row in rows} == {0.0, 1.0} and [row["caption"] for row in rows] == [CAPTIONS[i] for i in few.labels]
    for row, winner, loser in zip(rows, pairs.winners.pixels, pairs.losers.pixels, strict=True):
        better, worse = ("jpg_0", "jpg_1") if row["label_0"] == 1.0 else ("jpg_1", "jpg_0")
        for name, pixels in ((better, winner), (worse, loser)):
            image = np.asarray(Image.open(BytesIO(row[name]))) / 255
            assert np.abs(image - pixels.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_the_judge_reads_levels_of_digits_it_has_not_seen(judge: Judge, digits: tuple[Digits, Digits]) -> None:
    learnt = digits[0]
    labels = learnt.labels.tolist()
    found = {level: judge.score(at(learnt, level), labels) for level in (0.0, 0.3, 0.6, 0.9)}
    for level, scores in found.items():
        assert scores.level == pytest.approx(level, abs=0.06)
        assert scores.samples == len(learnt)
    accuracies, distances = ([getattr(scores, name) for scores in found.values()] for name in ("prompt_accuracy", "distance"))
    assert accuracies[0] > 0.95 and accuracies == sorted(accuracies, reverse=True) and distances == sorted(distances)


def test_diversity_is_of_digits_and_not_of_grain(judge: Judge, digits: tuple[Digits, Digits]) -> None:
    learnt = digits[0]
    labels = learnt.labels.tolist()
    first = {label: labels.index(label) for label in range(10)}
    alike = Digits(learnt.pixels[[first[label] for label in labels]], learnt.labels)
    assert judge.diversity(alike.pixels, labels) == pytest.approx(1, abs=1e-6)
    real = judge.diversity(learnt.pixels, labels)
    assert judge.diversity(at(alike, 0.3), labels) < 1 + 0.1 * (real - 1)
    assert judge.diversity(at(learnt, 0.3), labels) == pytest.approx(real, rel=0.05)


def test_the_base_draws_and_its_widened_copy_improves(digits: tuple[Digits, Digits], tmp_path: Path) -> None:
    """Through plain diffusers; at the start an improvement model is the base."""
    from seppo_fast.models import open_model
    from seppo_fast.models.export import save_pipeline

    recipe = replace(recipe_of(0), vae_steps=3, text_steps=3, denoiser_steps=3, batch_size=8, copies=1)
    assert make_base(tmp_path / "base", recipe) and not make_base(tmp_path / "base", recipe)
    assert draw(tmp_path / "base", [1, 2], 0, 2, 2.0).shape == (2, 3, 16, 16)
    weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    other = draw(tmp_path / "base", [1, 2], 0, 2, 2.0, weights=weights)
    torch.testing.assert_close(other, draw(tmp_path / "base", [1, 2], 0, 2, 2.0))
    model = open_model(str(tmp_path / "base"), image_condition=True)
    save_pipeline(model, dict(model.load_denoiser(torch.float32).named_parameters()), tmp_path / "improvement", None, "card")
    made = improve(tmp_path / "improvement", digits[0].pixels[:3], [1, 2, 3], 0, 2, 1.5, 1.5, batch_size=2)
    assert made.shape == (3, 3, 16, 16) and made.isfinite().all() and 0 <= made.min() and made.max() <= 1


def test_report(tmp_path: Path) -> None:
    scores = {"base": Scores(0.66, 0.9, 3.7, 2.5, 400), "iterative DPO, iteration 3": Scores(0.2, 0.955, 2.75, 2.4, 400)}
    lines = {line[:28].strip(): line[28:].split() for line in table(scores).splitlines()}
    assert lines["iterative DPO, iteration 3"] == ["0.20", "95.5%", "2.75", "2.40"]
    rows = [{"update": update, "iteration": update, "loss": 0.5, "implicit_acc": 0.75, "seconds_sampling": 1.0,
             "seconds_training": 2.0, "seconds_data": 0.0} for update in (1, 2)]
    write_result(tmp_path / "result.json", scores, rows, {"total": 5.0}, {"seed": 0})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["scores"]["base"]["level"] == 0.66 and result["last_iteration"] == {"loss": 0.5, "implicit_acc": 0.75}
    grids(tmp_path / "improved.png", {name: torch.rand(20, 3, 16, 16) for name in ("loser", "improved", "winner")},
          [i % 10 for i in range(20)], per_prompt=2)
    assert Image.open(tmp_path / "improved.png").size[0] > 500


def test_the_shipped_configurations_are_the_two_stages(tmp_path: Path) -> None:
    one, two = (load_config(name, [*overrides(tmp_path, seed=3), f"seppo.data.source={tmp_path / 'pairs.parquet'}"])
                for name in STAGES)
    assert (one.seppo.method, two.seppo.method) == ("improvement", "iterative_dpo")
    assert (two.seppo.reference, two.seppo.flipper, two.seppo.seed) == ("initial", "none", 3)
    for config in (one, two):
        assert config.seppo.data.resolution == 16 and not config.seppo.data.flip  # a mirrored two is no two
        total = config.deepspeed["scheduler"]["params"]["total_num_steps"]
        assert total == config.seppo.updates and batch_plan(config.deepspeed, 1).size == 64
    assert two.seppo.sampler.samples_per_iteration
