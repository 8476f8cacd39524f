"""Loss or gradients that are not finite: the update is skipped and counted, the weights stay, too many in a row end the run.

The causes are real: a cached latent or a weight of the model that is NaN, an absurd learning rate, an absurd beta.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import Weights, apart, column, identical, rows, unet_of, weights
from safetensors.torch import load_file, save_file

from seppo_fast.checksums import Hashing
from seppo_fast.data.latents import LatentCache
from seppo_fast.data.order import Order
from seppo_fast.data.stamps import declare, read_stamp
from seppo_fast.errors import UserError

MODES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "zero 1": {"zero_optimization": {"stage": 1}},
    "zero 2": {"zero_optimization": {"stage": 2}},
    "zero 3": {"zero_optimization": {"stage": 3}},
    "bf16": {"bf16": {"enabled": True}},
    "lora, no clipping": {"seppo.model.lora": {"rank": 2}, "gradient_clipping": 0.0},
}
BAD_ROW = 5


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Will be a cache whose row BAD_ROW has latents that are not finite."""
    return tmp_path_factory.mktemp("poisoned")


@pytest.fixture
def poison(settings: Callable[..., dict[str, Any]], train: Callable[..., Path], poisoned: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings that make runs use that cache."""
    changes = {"seppo.data.cache_dir": str(poisoned)}
    if not any(poisoned.iterdir()):
        train(settings(**changes, **{"seppo.method": "sft", "seppo.output_dir": str(tmp_path / "fill"), "seppo.iterations": 1}))
        (folder,) = poisoned.iterdir()
        needle = LatentCache(folder).rows([BAD_ROW]).mean.half().numpy().tobytes()
        holders = [file for file in (folder / "latents").glob("*.arrow") if needle in file.read_bytes()]
        assert len(holders) == 1
        stamp, damaged = read_stamp(holders[0]), holders[0].read_bytes().replace(needle, b"\xff" * len(needle))
        with holders[0].open("wb") as file:
            (hashing := Hashing(file)).write(damaged)
        declare(holders[0], hashing, stamp)  # or it would be made anew
        assert LatentCache(folder).rows([BAD_ROW]).mean.isnan().all()
    return changes


def bad_updates(updates: int) -> list[int]:
    """The updates (from 1) of 8 pairs whose window has BAD_ROW."""
    order = Order(24, 0)
    return [update + 1 for update in range(updates) if BAD_ROW in map(order.row, range(update * 8, update * 8 + 8))]


def policies(run: Path) -> dict[int, Weights]:
    """The policy after each update."""
    checkpoints = sorted((run / "checkpoints").iterdir())
    return {int(path.name.split("_")[1]): load_file(path / "policy.safetensors") for path in checkpoints}


@pytest.mark.parametrize("mode", MODES)
def test_update_with_nan_is_skipped(mode: str, settings: Callable[..., dict[str, Any]], train: Callable[..., Path],
                                    poison: dict[str, Any]) -> None:
    """One row in 24: its update leaves the weights alone, the others are made as ever, and nothing stops."""
    run = train(settings(**poison, **MODES[mode], **{
        "seppo.max_nonfinite": 2, "seppo.checkpoint.every": 1, "seppo.checkpoint.keep_last": 9}))
    bad, after = bad_updates(4), policies(run)
    assert bad and bad[0] > 1 and bad[-1] < 4  # there are good ones before and after
    for update in (2, 3, 4):
        assert identical(after[update], after[update - 1]) == (update in bad), update
    assert all(weight.isfinite().all() for weight in after[4].values())
    assert column(run, "skipped_steps") == [sum(b <= update for b in bad) for update in (1, 2, 3, 4)]
    for row in rows(run):
        assert (row["loss"] is None) == (row["grad_norm"] is None) == (row["update"] in bad)
    assert f"{len(bad)} of them skipped" in (run / "final" / "README.md").read_text()


@pytest.mark.parametrize("mode", ["fp32", "zero 2", "bf16", "lora, no clipping"])
def test_finite_loss_with_infinite_gradients_is_skipped(mode: str, trained: Callable[..., Path], sd: Path) -> None:
    """beta 1e36: log 2 for a loss and gradients whose norm no fp32 holds, in every update."""
    run = trained(**MODES[mode], **{"seppo.beta": 1e36, "seppo.iterations": 1, "seppo.checkpoint.every": 1,
                                    "seppo.max_nonfinite": 9})
    assert column(run, "loss") == pytest.approx([0.6931472, 0.6931472])
    assert column(run, "grad_norm") == [None, None] and column(run, "skipped_steps") == [1, 2]
    first, second = policies(run).values()
    assert identical(first, second)
    if "lora" not in mode:
        assert identical(weights(run), {name: weight.to(first[name].dtype) for name, weight in unet_of(sd).items()})


@pytest.mark.parametrize("mode", ["fp32", "zero 2", "bf16"])
def test_too_many_in_a_row_stop_the_run(mode: str, settings: Callable[..., dict[str, Any]], train: Callable[..., Path],
                                        tmp_path: Path) -> None:
    """A learning rate of 1e30: from the second update on nothing is finite."""
    raw = settings(**MODES[mode], **{"optimizer.params.lr": 1e30, "seppo.iterations": 9, "seppo.max_nonfinite": 3,
                                     "seppo.updates_per_iteration": 1, "seppo.checkpoint.keep_last": 9})
    with pytest.raises(UserError, match="3 updates in a row .* not finite") as stop:
        train(raw)
    run = tmp_path / "run"
    assert column(run, "skipped_steps") == [0, 1, 2, 3]
    assert "update 4" in str(stop.value) and "optimizer.params.lr" in str(stop.value)
    assert "from before the error on the winners left its range: none yet" in str(stop.value), "the first update destroyed it"
    after = policies(run)
    assert identical(after[1], after[2]) and identical(after[2], after[3])
    assert not (run / "final").exists()


def test_counting_starts_again_after_a_good_update(settings: Callable[..., dict[str, Any]], train: Callable[..., Path],
                                                   poison: dict[str, Any]) -> None:
    """Two skipped updates that are not in a row do not stop a run that stops at two in a row."""
    bad = bad_updates(6)
    assert len(bad) == 2 and bad[1] - bad[0] > 1
    run = train(settings(**poison, **{"seppo.max_nonfinite": 2, "seppo.iterations": 3}))
    assert column(run, "skipped_steps")[-1] == 2
    with pytest.raises(UserError, match="1 updates in a row"):
        train(settings(**poison, **{"seppo.max_nonfinite": 1, "seppo.output_dir": str(run.parent / "strict")}))


def test_nan_in_the_model_is_named_before_training(settings: Callable[..., dict[str, Any]], train: Callable[..., Path],
                                                   tmp_path: Path, sd: Path) -> None:
    broken = Path(shutil.copytree(sd, tmp_path / "broken"))
    unet = unet_of(sd)
    unet["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(unet, broken / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors has weights that are not finite .*: conv_in.weight"):
        train(settings(**{"seppo.model.path": str(broken), "seppo.max_nonfinite": 1}))


def test_ranks_skip_together(settings: Callable[..., dict[str, Any]], train_on_ranks: Callable[..., list[Path]],
                             train: Callable[..., Path], poison: dict[str, Any], tmp_path: Path) -> None:
    """Only one rank meets the bad row; the update is skipped on both, and the model is the one that one rank trains."""
    steady = {"optimizer.params.eps": 1e-5}
    alone = train(settings(**poison, **steady))
    for run in train_on_ranks([settings(**poison, **steady, **MODES[mode], **{"seppo.output_dir": str(tmp_path / mode)})
                               for mode in ("fp32", "zero 2")]):
        assert apart(weights(run), weights(alone)) < 2e-5
        assert column(run, "skipped_steps") == column(alone, "skipped_steps")
        for mine, theirs in zip(column(run, "loss"), column(alone, "loss"), strict=True):
            assert mine is theirs is None or mine == pytest.approx(theirs, rel=1e-3)
