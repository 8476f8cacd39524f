"""The Vendi score where it is known in closed form, and against the eigenvalues of its definition."""

import math

import numpy as np
import pytest
import torch

from seppo_fast.evaluation.scores.vendi import vendi


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
