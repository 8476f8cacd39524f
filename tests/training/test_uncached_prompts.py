"""Runs that embed their prompts when they are needed end with the same bytes as runs that keep the embeddings."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forks, Strike
from outcomes import identical, steady_rows, weights
from tiny import tiny_sd3
from torch import nn
from transformers import CLIPTextModel

from seppo_fast.data import prompt_encoder
from seppo_fast.training.trainer import Trainer

Run = Callable[..., Path]
AHEAD = {"seppo.sampler.window": "iteration", "seppo.reference_score": "rollout", "seppo.caption_dropout": 0.3}
LOOKS = {"seppo.data.hold_out": 5, "seppo.evaluation": {"every": 2}, "seppo.samples": {"every": 4}}
SETS = {"seppo.sampler.samples_per_iteration": 8}
DPO, IMPROVEMENT = {"seppo.method": "dpo"}, {"seppo.method": "improvement", "seppo.samples": {"every": 4}}


def both(settings: Callable[..., dict[str, Any]], folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The configuration with the embeddings kept, and without."""
    return [settings(**{"seppo.data.cache_dir": str(folder / f"cache {kept}"), "seppo.output_dir": str(folder / f"run {kept}"),
                        **changes, "seppo.data.cache_prompts": kept}) for kept in (True, False)]


def same(one: Path, other: Path) -> None:
    assert identical(weights(one), weights(other)) and steady_rows(one) == steady_rows(other)


@pytest.fixture
def encoded() -> Iterator[list[int]]:
    """How many prompts were in each call of the text encoder meanwhile."""
    calls: list[int] = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, result: calls.append(len(result[0])) if isinstance(module, CLIPTextModel) else None)
    yield calls
    hook.remove()


@pytest.mark.parametrize("changes", [AHEAD, SETS | LOOKS, DPO, IMPROVEMENT], ids=str)
def test_a_run_ends_with_the_same_bytes(changes: dict[str, Any], settings: Any, train: Run, tmp_path: Path, pickapic: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """In windows of a few prompts."""
    monkeypatch.setattr(prompt_encoder, "WINDOW", 9 * 77 * 32 * 2)
    if changes in (DPO, IMPROVEMENT):
        changes = changes | {"seppo.data.source": str(pickapic)}
    kept, made = map(train, both(settings, tmp_path, **changes))
    same(kept, made)
    for file in (kept / "samples").glob("*"):
        assert file.read_bytes() == (made / "samples" / file.name).read_bytes()
    assert list((tmp_path / "cache True").glob("*/prompts/*.arrow")) and not list((tmp_path / "cache False").glob("*/prompts"))


def test_a_flow_with_t5(settings: Any, train: Run, tmp_path: Path) -> None:
    model = tiny_sd3(tmp_path / "model")
    same(*map(train, both(settings, tmp_path, **{
        "seppo.model.path": str(model), "seppo.model.lora": {"rank": 2}, "seppo.sampler.solver": "euler", "seppo.iterations": 1})))


def test_equal_captions_are_embedded_once_and_before_the_device_is_needed(
        settings: Any, train: Run, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 pairs with three captions: the empty prompt, and each caption once. None by `pairs`, which runs in a thread."""
    before, train_on = [], Trainer.update_policy
    monkeypatch.setattr(Trainer, "update_policy", lambda self, update: (before.append(len(encoded)), train_on(self, update))[1])
    train(both(settings, tmp_path)[1])
    assert encoded == [1] * 4 and before == [4] * 4


def test_a_window_of_rollouts_is_drawn_before_the_next_one(settings: Any, train: Run, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    hold = prompt_encoder.PromptEncoder.hold
    monkeypatch.setattr(prompt_encoder.PromptEncoder, "hold",
                        lambda self, prompts: (held.append(len(prompts := list(prompts))), hold(self, prompts))[1])
    monkeypatch.setattr(prompt_encoder, "WINDOW", 4 * 77 * 32 * 2)  # of four prompts
    ahead = {"seppo.sampler.window": "iteration", "seppo.sampler.batch_size": 2, "seppo.iterations": 1}
    train(both(settings, tmp_path, **ahead)[1])
    assert held == [0, 4, 4, 4, 4, 8, 8]  # at the start, an iteration's 16 rollouts, and its two updates


def test_two_ranks_have_an_encoder_each(settings: Any, train_on_ranks: Callable[..., list[Path]], tmp_path: Path) -> None:
    changes = {**LOOKS, "train_micro_batch_size_per_gpu": 2, "seppo.iterations": 1}
    same(*train_on_ranks(both(settings, tmp_path, **changes)))


def test_a_resumed_run_may_go_the_other_way(settings: Any, forks: Forks, tmp_path: Path) -> None:
    changes = {"seppo.checkpoint.every": 1}
    # forked, as the others: on some processors a run in this process rounds otherwise
    assert forks.run(settings(**changes, **{"seppo.output_dir": str(tmp_path / "whole")})).statuses == [0]
    begun, resumed = both(settings, tmp_path, **changes, **{"seppo.output_dir": str(tmp_path / "broken"),
                                                            "seppo.data.cache_dir": str(tmp_path / "cache")})
    strike = Strike("seppo_fast.training.objective:Objective.__call__", 4)
    assert forks.run(begun, strike=strike).statuses != [0]
    done = forks.run(resumed, "--resume", "auto")
    assert done.statuses == [0] and "resuming from" in done.output, done.output[-3000:]
    same(tmp_path / "whole", tmp_path / "broken")
