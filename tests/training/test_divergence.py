"""A learning rate that destroys the policy: the newest checkpoint from before is kept, named, and can be begun anew from."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import column

from seppo_fast.errors import UserError
from seppo_fast.training import checkpoint
from seppo_fast.training.checkpoint import State
from seppo_fast.training.divergence import FEW, largest_in_range


def watched(errors: list[float]) -> State:
    """A state after updates with these errors on the winners."""
    state = State("run", 1, None, {})
    for error in errors:
        state.update += 1
        state.watch(error)
    return state


@pytest.mark.parametrize("spread", [0.05, 0.4, 1.2])
def test_healthy_errors_stay_in_range(spread: float) -> None:
    """Windows of many pairs, of few and of one, with a slow rise to twice the error."""
    generator = torch.Generator().manual_seed(0)
    rise = torch.linspace(0, math.log(2), 500)
    state = watched((0.1 * (spread * torch.randn(500, generator=generator) + rise).exp()).tolist())
    assert state.sound == 499 and not state.diverged


@pytest.mark.parametrize("lost", [5.0, 1e30, math.inf, math.nan])
def test_a_destroyed_policy_is_out_of_range_for_good(lost: float) -> None:
    state = watched([0.1, 0.12, 0.09, 0.11, 0.1, 0.13, 0.1, 0.09, 0.1, *[lost] * 200])
    assert state.sound == 8 and state.diverged, "the tenth error is that of the policy after nine updates"
    assert largest_in_range(state.errors) == pytest.approx(0.4, rel=0.3) and len(state.errors) > FEW
    state.update += 1
    assert state.watch(0.1) and not state.diverged and state.sound == 209


def test_the_checkpoint_from_before_stays_and_is_named(settings: Callable[..., dict[str, Any]], train: Callable[..., Path],
                                                       tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate that grows from nothing to 1e5 within a few updates."""
    ramp = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e9, "warmup_num_steps": 12, "warmup_type": "log"}}
    changes = {"scheduler": ramp, "seppo.method": "sft", "seppo.iterations": 12, "seppo.updates_per_iteration": 1,
               "seppo.checkpoint.keep_last": 1, "seppo.max_nonfinite": 1}
    raw = settings(**changes)
    raw["scheduler"]["params"]["warmup_max_lr"] = 1e30
    with pytest.raises(UserError, match="not finite") as stop:
        train(raw)
    errors, run = column(tmp_path / "run", "model_mse_winner"), tmp_path / "run"
    assert any(error is None or error > 1e3 for error in errors)
    assert "left its range" in capsys.readouterr().out or errors[1] is None
    kept = [path.name for path in checkpoint.complete(run / "checkpoints")]
    assert kept, errors
