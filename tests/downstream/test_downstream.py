"""A trainer with a hand-written Diffusion-DPO loss gets the same weights from `seppo_loss(..., flipper="none")`.

Same means: no weight differs by more than 2e-4 of the distance that the weight that moved most has moved. The hand-written
loss computed in fp64 is as far from itself in fp32 as the replacement is, 1e-5 to 4e-5: Adam divides by the gradient's own size, so
that the last bits of small gradients show.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from downstream import dpo_trainer
from downstream.dpo_trainer import diffusion_dpo_loss, replaced_loss, replaced_loss_of_known_scale, train
from torch import Tensor

from seppo_fast.ops import available_backends, loss, seppo_loss

TOLERANCE = 2e-4
RUNS = {"every batch an update": {"updates": 60}, "four batches an update": {"updates": 30, "accumulation": 4}}
Trained = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Trained]:
    return {name: train(diffusion_dpo_loss, **options) for name, options in RUNS.items()}


@pytest.fixture(params=["what there is", "reference"])
def auto(request, monkeypatch) -> Iterator[str]:
    """The backend that "auto" takes: the fastest here, or the reference, as where nothing was built."""
    if request.param == "reference":
        monkeypatch.setattr(loss, "_find_out", lambda name, device: None if name == "reference" else "hidden by a test")
    taken = next(name for name, state in available_backends("cpu").items() if state == "available")
    assert request.param in (taken, "what there is")
    yield taken


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def assert_the_same(trained: Trained, wanted: Trained) -> None:
    moved = distance(wanted[0], wanted[1])
    assert moved > 0.01  # in steps of at most 1e-3
    assert distance(trained[0], wanted[0]) == 0
    assert distance(trained[1], wanted[1]) < TOLERANCE * moved
    torch.testing.assert_close(trained[2], wanted[2], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("replacement", [replaced_loss, replaced_loss_of_known_scale])
@pytest.mark.parametrize("shared_target", [False, True], ids=["target of 2B", "target of B"])
@pytest.mark.parametrize("run", RUNS)
def test_trains_to_the_same_weights(by_hand, auto, run, shared_target, replacement) -> None:
    assert_the_same(train(replacement, shared_target=shared_target, **RUNS[run]), by_hand[run])


def test_the_hand_written_loss_learns_the_preference(by_hand) -> None:
    """Otherwise any two losses would end up at the same weights."""
    history = by_hand["every batch an update"][2]
    assert history[0, 0] == pytest.approx(0.6931, abs=1e-4) and history[-10:, 0].mean() < 0.4
    assert (history[:, 1] > 1).any() and (history[:, 1] < 1).any()  # some gradients are clipped and some are not


def wrong_flipper(model_pred: Tensor, ref_pred: Tensor, target: Tensor, accumulation: int) -> Tensor:
    return seppo_loss(model_pred, ref_pred, target, dpo_trainer.BETA) / accumulation


def wrong_beta(model_pred: Tensor, ref_pred: Tensor, target: Tensor, accumulation: int) -> Tensor:
    return seppo_loss(model_pred, ref_pred, target, 1.01 * dpo_trainer.BETA, flipper="none") / accumulation


def wrong_scale(model_pred: Tensor, ref_pred: Tensor, target: Tensor, accumulation: int) -> Tensor:
    return seppo_loss(model_pred, ref_pred, target, dpo_trainer.BETA, flipper="none", grad_scale=1.0) / accumulation


@pytest.mark.parametrize("wrong", [wrong_flipper, wrong_beta, wrong_scale])
def test_a_loss_that_is_a_little_different_is_noticed(by_hand, wrong: Callable[..., Tensor]) -> None:
    run = "four batches an update"
    with pytest.raises(AssertionError):
        assert_the_same(train(wrong, **RUNS[run]), by_hand[run])
