"""`reference_score: rollout`: the reference's errors are computed once, with its samples, and the same model comes out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from outcomes import apart, column, identical, rows, unet_of, weights
from safetensors.torch import load_file

from seppo_fast.configfile import parse_config
from seppo_fast.errors import UserError
from seppo_fast.training.objective import Objective
from seppo_fast.training.trainer import Trainer

Trained = Callable[..., Path]
# eps: where a gradient is nothing but rounding, Adam would divide it by itself and make a whole step of it.
STEADY = {"optimizer.params.eps": 1e-5, "seppo.beta": 300.0}
ROLLOUT = {"seppo.reference_score": "rollout"}
CASES: dict[str, dict[str, Any]] = {
    "seppo": {},
    "other batches": {"train_micro_batch_size_per_gpu": 1, "seppo.sampler.batch_size": 3},
    "window of an iteration, shared noise": {"seppo.sampler.window": "iteration", "seppo.noise": "shared"},
    "captions dropped": {"seppo.caption_dropout": 0.5},
    "lora": {"seppo.model.lora": {"rank": 2, "alpha": 4.0}},
    "dpo": {"seppo.method": "dpo"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_model_as_online(case: str, trained: Trained, pickapic: Path, sd: Path) -> None:
    changes = STEADY | CASES[case] | ({"seppo.data.source": str(pickapic)} if case == "dpo" else {})
    online, rollout = trained(**changes), trained(**changes, **ROLLOUT)
    if case != "lora":
        assert apart(weights(online), unet_of(sd)) > 1e-3
    assert apart(weights(online), weights(rollout)) < 2e-5
    for one, other in zip(rows(online), rows(rollout), strict=True):
        for name in ("loss", "model_mse_winner", "ref_mse_winner", "ref_mse_loser", "logit_p05", "logit_p95", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-3), name


def test_training_calls_no_reference(settings: Any, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors are there when a window of training begins, and it is asked in the sampler's batches, once a pair."""
    asked, scored = [], []
    score, update = Objective.score, Trainer.update_policy

    def counted(self: Objective, reference: torch.nn.Module, pairs: Any) -> torch.Tensor:
        scored.append(len(pairs.timesteps))
        return score(self, reference, pairs)

    def without_reference(self: Trainer, number: int) -> Any:
        hook = self.reference.module.register_forward_hook(lambda *_: asked.append(number))
        try:
            return update(self, number)
        finally:
            hook.remove()

    monkeypatch.setattr(Objective, "score", counted)
    monkeypatch.setattr(Trainer, "update_policy", without_reference)
    train(settings(**{"seppo.sampler.batch_size": 5, "train_micro_batch_size_per_gpu": 2, "seppo.sampler.window": "iteration"},
                   **ROLLOUT))
    assert asked == [] and scored == [4, 4, 4, 4] * 2  # 2 iterations of 16 pairs, evenly


def test_scores_are_in_the_checkpoint(settings: Any, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run resumed in the middle of a window trains on the scores that were made before it stopped."""
    raw = settings(**ROLLOUT, **{"seppo.sampler.window": "iteration", "seppo.checkpoint.every": 1})
    run = train(raw)
    first = run / "checkpoints" / "update_00000003_00000008"
    kept = load_file(first / "rollouts_0.safetensors")
    assert kept["made.ref_mse"].shape == (8, 2) and kept["made.loser"].shape == (8, 4, 8, 8)
    before = weights(run)
    monkeypatch.setattr(Objective, "score", None)
    again = train(raw, str(first))
    assert identical(before, weights(again)) and column(again, "update") == [1, 2, 3, 4]


def test_a_method_without_reference_has_no_score(settings: Any) -> None:
    with pytest.raises(UserError, match="reference_score='rollout' does not go with method='sft'"):
        parse_config(settings(**{"seppo.method": "sft"}, **ROLLOUT))


@pytest.mark.parametrize("changes, rests", [(ROLLOUT | {"seppo.sampler.window": "iteration"}, True), (ROLLOUT, False),
                                            ({"seppo.sampler.window": "iteration"}, False)],
                         ids=["iterations scored ahead", "updates scored ahead", "online"])
def test_the_reference_leaves_the_device_while_nobody_asks_it(changes: dict[str, Any], rests: bool, settings: Any, train: Any,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU there is nowhere to go; seen here is where it was sent last when it is asked and when the policy is trained."""
    sent, seen = ["device"], []
    to, draw, update = UNet2DConditionModel.to, Trainer.draw, Trainer.update_policy

    def moved(self: UNet2DConditionModel, where: Any) -> Any:
        sent.append("host" if where == "cpu" else "device")
        return to(self, where)

    def drawn(self: Trainer, *given: Any) -> Any:
        monkeypatch.setattr(UNet2DConditionModel, "to", moved)  # from here on only the trainer moves a model
        seen.append(("drawn", sent[-1]))
        return draw(self, *given)

    def updated(self: Trainer, number: int) -> Any:
        seen.append(("trained", sent[-1]))
        return update(self, number)

    monkeypatch.setattr(Trainer, "draw", drawn)
    monkeypatch.setattr(Trainer, "update_policy", updated)
    train(settings(**changes))
    assert set(seen) == {("drawn", "device"), ("trained", "host" if rests else "device")}


def test_a_resting_reference_is_fetched_once_an_iteration(settings: Any, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for updates that have all they need, nor when a run is resumed among them."""
    sent, seen = [], []
    to, loop = UNet2DConditionModel.to, Trainer.train

    def moved(self: UNet2DConditionModel, where: Any) -> Any:
        sent.append("host" if where == "cpu" else "device")
        return to(self, where)

    def watched(self: Trainer) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(UNet2DConditionModel, "to", moved)
            loop(self)
        seen.append(sent[:])
        sent.clear()

    monkeypatch.setattr(Trainer, "train", watched)
    raw = settings(**ROLLOUT, **{"seppo.sampler.window": "iteration", "seppo.checkpoint.every": 1})
    run = train(raw)
    train(raw, str(run / "checkpoints" / "update_00000003_00000008"))
    assert seen == [["host", "device", "host", "device", "host"], ["host"]]


def test_ties_last_until_the_policy_moves(settings: Any, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that is skipped leaves the policy what it was: the next one is against itself, too."""
    update = Trainer.update_policy

    def spoiled(self: Trainer, number: int) -> Any:
        weight = next(self.engine.module.parameters())
        hook = weight.register_hook(lambda gradient: gradient * (torch.inf if number == 0 else 1))
        try:
            return update(self, number)
        finally:
            hook.remove()

    monkeypatch.setattr(Trainer, "update_policy", spoiled)
    run = train(settings(**{"seppo.reference": "latest", "seppo.updates_per_iteration": 3}, **ROLLOUT))
    assert column(run, "skipped_steps") == [1] * 6
    ties = [(rate, low, high) == (1, 0, 0) for rate, low, high in
            zip(*(column(run, name) for name in ("aaf_rate", "logit_p05", "logit_p95")), strict=True)]
    assert ties == [True, True, False, True, False, False]
