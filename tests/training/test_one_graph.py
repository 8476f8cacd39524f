"""`seppo.model.compile: "full"`: policy and reference as one graph each, while samples are drawn as ever."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import apart, column, identical, unet_of, weights
from torch._dynamo.utils import counters

from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.errors import UserError
from seppo_fast.training.engine import check_engine_config
from seppo_fast.training.trainer import Trainer

Trained = Callable[..., Path]
FULL = {"seppo.model.compile": "full"}
# eps: see test_speed_keys. The first update of an iteration against the latest policy is all ties.
STEADY = {"optimizer.params.eps": 1e-5, "seppo.beta": 300.0, "seppo.reference": "latest"}


def ties(run: Path) -> list[tuple[float, float]]:
    """The AAF rate and the lowest logits of the first update of each iteration."""
    return [(rate, low) for rate, low in zip(column(run, "aaf_rate"), column(run, "logit_p05"), strict=True)][::2]


def graphs_by_update(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many graphs there are after each update to come."""
    seen, update = [], Trainer.update_policy

    def counted(self: Trainer, number: int) -> Any:
        done = update(self, number)
        seen.append(counters["stats"]["unique_graphs"])
        return done

    monkeypatch.setattr(Trainer, "update_policy", counted)
    return seen


def test_the_same_model_from_two_graphs(trained: Trained, sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One each for policy and reference, forward and backward, made before the first update has ended."""
    plain = trained(**STEADY)
    # Inductor would compile C++ for minutes; Dynamo and autograd's part are what can go wrong here.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    before, seen = counters["stats"]["unique_graphs"], graphs_by_update(monkeypatch)
    whole = trained(**STEADY, **FULL, **{"seppo.model.gradient_checkpointing": True})
    assert [graphs - before for graphs in seen] == [2] * 4
    assert apart(weights(plain), unet_of(sd)) > 1e-3 > 2e-5 > apart(weights(plain), weights(whole))
    assert ties(whole) == [(1, 0)] * 2


def calls_of(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> None:
    """In place of the compiler: a compiled network's forward is `answer(forward, *given, **named)`."""
    monkeypatch.setattr(torch, "compile", lambda forward, **_: partial(answer, forward))


def test_training_alone_calls_the_graphs(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """What samples are drawn with, 8 at once in two branches, is compiled by a key of its own; nor is anything compiled twice."""
    called = []

    def noted(forward: Any, latents: torch.Tensor, *given: Any, **named: Any) -> Any:
        called.append((forward.__self__.training, len(latents), torch.is_grad_enabled()))
        return forward(latents, *given, **named)

    plain = trained(**STEADY)
    calls_of(monkeypatch, noted)
    watched = trained(**STEADY, **FULL, **{"seppo.samples.every": 1})
    assert called == [(True, 8, True), *[(False, 8, True), (True, 8, True)] * 8], "the policy, then both in each micro-batch"
    assert identical(weights(watched), weights(plain))


def test_ties_with_kernels_that_round_by_mode(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler makes other kernels with gradients than without: what they round differently must not decide the first signs."""
    calls_of(monkeypatch, lambda forward, *given, **named: [forward(*given, **named)[0] * (1 + 1e-6 * torch.is_grad_enabled())])
    assert ties(trained(**STEADY, **FULL, **{"seppo.seed": 1})) == [(1, 0)] * 2


def test_a_compiler_that_fails_leaves_the_plain_networks(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **named: Any) -> None:
        raise RuntimeError("no graph of this")

    calls_of(monkeypatch, fails)
    with pytest.warns(RuntimeWarning, match="seppo.model.compile does not work here, and the run goes on without it .*no graph of"):
            run = trained(**STEADY, **FULL)
    assert identical(weights(run), weights(trained(**STEADY)))


@pytest.mark.parametrize("changes", [{"seppo.method": "sft"}, {"seppo.method": "improvement"}], ids=["sft", "improvement"])
def test_the_first_micro_batch_finds_its_graph(changes: dict[str, Any], settings: Any, train: Any, pickapic: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial is in the shapes and dtypes of what follows; each other would be compiled once more."""
    shapes = []

    def noted(forward: Any, *given: Any, **named: Any) -> Any:
        tensors = [value for value in torch.utils._pytree.tree_leaves((given, named)) if isinstance(value, torch.Tensor)]
        shapes.append([(value.shape, value.dtype, value.stride()) for value in tensors])
        return forward(*given, **named)

    calls_of(monkeypatch, noted)
    train(settings(**FULL, **changes, **{"seppo.data.source": str(pickapic), "seppo.iterations": 1, "bf16": {"enabled": True}}))
    assert len(shapes) == 5 and all(each == shapes[0] for each in shapes)


def test_what_it_does_not_go_with_is_refused(settings: Any) -> None:
    third = parse_config(settings(**FULL, **{"zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError, match='seppo.model.compile: "full" does not go with zero_optimization.stage 3'):
        check_engine_config(third, batch_plan(third.deepspeed, 1))
    with pytest.raises(UserError, match="compile='full' does not go with quantize='int8'"):
        parse_config(settings(**FULL, **{"seppo.model.lora": {"rank": 2}, "seppo.model.quantize": "int8"}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", [{}, {"seppo.model.gradient_checkpointing": True}, {"seppo.model.lora": {"rank": 2}},
                                     {"seppo.model.channels_last": True}], ids=["plain", "checkpointing", "lora", "channels_last"])
def test_ties_on_a_gpu(changes: dict[str, Any], trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of the real compiler, in half precision."""
    before, seen = counters["stats"]["unique_graphs"], graphs_by_update(monkeypatch)
    run = trained(**STEADY, **FULL, **changes, **{"bf16": {"enabled": True}})
    assert ties(run) == [(1, 0)] * 2
    assert [graphs - before for graphs in seen] == [2] * 4
