"""What is there for speed changes the speed alone: layout, attention and compile of the policy train the same model."""

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from outcomes import apart, column, unet_of, weights

from seppo_fast.training.trainer import Trainer

Trained = Callable[..., Path]
# eps: where a gradient is nothing but rounding, Adam would divide it by itself and make a whole step of it.
STEADY = {"optimizer.params.eps": 1e-5, "seppo.beta": 300.0}


@pytest.mark.parametrize("changes", [{"seppo.model.channels_last": True}, {"seppo.model.compile": "regional"},
                                     {"optimizer.params.fused": True}], ids=["channels_last", "compile", "fused AdamW"])
def test_the_same_model(changes: dict[str, Any], trained: Trained, sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor would compile C++ for over a minute; Dynamo and autograd's part are what can go wrong here.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    plain, fast = trained(**STEADY), trained(**STEADY, **changes)
    assert apart(weights(plain), unet_of(sd)) > 1e-3
    assert apart(weights(plain), weights(fast)) < 2e-5
    assert column(fast, "skipped_steps")[-1] == 0


def test_ties_with_channels_last(trained: Trained) -> None:
    """Policy and reference are in the same layout: the first update of an iteration against the latest policy is all ties."""
    run = trained(**{"seppo.model.channels_last": True, "seppo.reference": "latest"})
    assert [(rate, low) for rate, low in zip(column(run, "aaf_rate"), column(run, "logit_p05"), strict=True)][::2] == [(1, 0)] * 2


@pytest.mark.parametrize("noises", [1, 3])
def test_ties_with_compiled_blocks(noises: int, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler makes other kernels with gradients than without: what they round differently must not decide the first signs."""
    def rounds_by_mode(block: torch.nn.Module, **_: Any) -> None:
        plain = block.forward
        block.forward = lambda *given, **named: plain(*given, **named) * (1 + 1e-6 * torch.is_grad_enabled())

    monkeypatch.setattr(torch.nn.Module, "compile", rounds_by_mode)
    run = trained(**{"seppo.model.compile": "regional", "seppo.reference": "latest", "seppo.aaf_draws": noises})
    assert [(rate, low) for rate, low in zip(column(run, "aaf_rate"), column(run, "logit_p05"), strict=True)][::2] == [(1, 0)] * 2


def test_a_compiled_reference_gets_the_policys_kernels(settings: Any, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked with gradients as the policy is; nothing of them is kept."""
    asked, update = [], Trainer.update_policy

    def watched(self: Trainer, number: int) -> Any:
        block = next(part for part in self.reference.module.modules() if isinstance(part, BasicTransformerBlock))
        hook = block.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
        try:
            return update(self, number)
        finally:
            hook.remove()
            assert all(weight.grad is None for weight in self.reference.module.parameters())

    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **_: None)
    monkeypatch.setattr(Trainer, "update_policy", watched)
    for compiled in ("none", "regional"):
        asked.clear()
        train(settings(**{"seppo.model.compile": compiled, "seppo.output_dir": settings()["seppo"]["output_dir"] + compiled}))
        assert set(asked) == {compiled == "regional"}
