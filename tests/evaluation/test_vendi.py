"""The Vendi score where it is known in closed form, and against the eigenvalues of its definition."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_sd

from seppo_fast.config import Sampler
from seppo_fast.errors import UserError
from seppo_fast.evaluate import parse_arguments
from seppo_fast.evaluation.arguments import request_of
from seppo_fast.evaluation.candidates import Candidate
from seppo_fast.evaluation.generate import Drawing
from seppo_fast.evaluation.prompts import Prompt
from seppo_fast.evaluation.request import Request
from seppo_fast.evaluation.scores.vendi import VENDI_PROMPT, vendi
from seppo_fast.evaluation.scoring import Job, found, score_sets


@pytest.mark.parametrize("count", [1, 7, 40])
def test_equal_images_count_as_one(count):
    assert vendi(torch.tensor([[0.3, -2.0, 1.0]]).repeat(count, 1)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("count", "width"), [(1, 5), (6, 6), (6, 100)])
def test_orthogonal_images_count_each(count, width):
    rotation = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    assert vendi(rotation[:count] * torch.arange(1, count + 1)[:, None]) == pytest.approx(count, abs=1e-9)


@pytest.mark.parametrize(("first", "second"), [(5, 5), (9, 3), (1, 30)])
def test_two_groups_count_by_the_entropy_of_their_sizes(first, second):
    groups = torch.cat([torch.tensor([[1.0, 0, 0, 0]]).repeat(first, 1), torch.tensor([[0, 0, 3.0, 0]]).repeat(second, 1)])
    p = first / (first + second)
    assert vendi(groups) == pytest.approx(math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p)), abs=1e-9)


def test_two_images_at_an_angle_count_by_its_cosine():
    cosine = math.cos(0.7)
    shares = ((1 + cosine) / 2, (1 - cosine) / 2)
    assert vendi(torch.tensor([[1.0, 0], [cosine, math.sin(0.7)]], dtype=torch.float64)) == pytest.approx(
        math.exp(-sum(share * math.log(share) for share in shares)), abs=1e-9)


@pytest.mark.parametrize(("count", "width"), [(12, 40), (40, 12)])
def test_it_is_the_exponential_of_the_entropy_of_the_similarities_eigenvalues(count, width):
    embeddings = np.random.default_rng(count).normal(size=(count, width)) + 1.0
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvals(unit @ unit.T / count).real
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    expected = np.exp(-(eigenvalues * np.log(eigenvalues)).sum())
    assert 1.5 < expected < min(count, width)
    assert vendi(torch.tensor(embeddings, dtype=torch.float32)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("embeddings", [torch.zeros(0, 4), torch.full((3, 4), torch.nan), torch.zeros(2, 4)])
def test_there_is_no_score_of_nothing_or_of_nan(embeddings):
    assert math.isnan(vendi(embeddings))


def test_within_prompts_each_prompt_has_a_value_and_the_score_is_their_mean(ranks, tmp_path):
    angles = {("base", 0): (0.0, math.pi / 2), ("base", 1): (0.3, 0.3), ("tuned", 0): (0.0, math.pi / 3), ("tuned", 1): (1.0, 1.0),
              ("base", 2): (0.1, 0.2), ("tuned", 2): (0.1,)}  # of the last one's two samples, one cannot be read
    samples = []
    for (model, prompt), own in angles.items():
        for number, angle in enumerate((*own, None)[:2]):
            name = f"{model}_{prompt}_{number}.png"
            (tmp_path / name).write_bytes(b"")
            if angle is not None:
                Image.new("RGB", (1, 1), (round(100 * angle), 0, 0)).save(tmp_path / name)
            samples.append({"prompt": prompt, "sample": number, "model": model, "file": name, "values": {}, "problem": None})

    def embed(images):
        angles = [image.getpixel((0, 0))[0] / 100 for image in images]
        return torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])

    prompts = [Prompt("a", ("one",)), Prompt("b", ("two",)), Prompt("c", ("two",))]
    request = Request([Candidate(name, name, None, None) for name in ("base", "tuned")], prompts, ["vendi_prompt"], {},
                      Drawing(0, 2, None, None, torch.float32, Sampler()), tmp_path, None, 2)
    rows = {(row["model"], row["group"]): row for row in score_sets(VENDI_PROMPT, embed, Job(request, samples, ranks))}

    def two(angle):
        shares = [(1 + sign * math.cos(angle)) / 2 for sign in (1, -1)]
        return math.exp(-sum(share * math.log(share) for share in shares if share))

    close = 2e-3  # an angle is a whole number of hundredths
    assert rows["base", "all"]["mean"] == pytest.approx((two(math.pi / 2) + 1 + two(0.1)) / 3, rel=close)
    assert rows["tuned", "all"]["mean"] == pytest.approx((two(math.pi / 3) + 1) / 2, rel=close)
    assert rows["tuned", "two"]["mean"] == pytest.approx(1) and rows["tuned", "two"]["count"] == 1
    assert (rows["base", "all"]["count"], rows["tuned", "all"]["count"]) == (3, 2)
    won = rows["tuned", "all"]["win_rate"]
    assert won["mean"] == 0.25 and won["count"] == 2  # one lost, one alike
    assert rows["base", "all"]["low"] < rows["base", "all"]["mean"] < rows["base", "all"]["high"]


def test_within_prompts_needs_several_samples_a_prompt(ranks, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    given = ["--models", f"base={tiny_sd(tmp_path / 'base')}", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path)]
    one, several = (request_of(parse_arguments([*given, "--per-prompt", count]), ranks, print) for count in "12")
    assert set(several.scores) - set(one.scores) == {"vendi_prompt"}
    with pytest.raises(UserError, match="Vendi within prompts compares the samples of a prompt: give --per-prompt 2 or more"):
        found(VENDI_PROMPT, one)
