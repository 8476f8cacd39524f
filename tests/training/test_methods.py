"""Five methods, three references, three flippers, two choices, five solvers: one loop, and each does what its name says."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from outcomes import apart, column, identical, rows, unet_of, weights
from tiny import NARROW, tiny_sd

from seppo_fast.config import Data
from seppo_fast.data import build_cache, open_source
from seppo_fast.models import open_model
from seppo_fast.reference.pool import pick

Trained = Callable[..., Path]
THREE = {"seppo.iterations": 3}
STATISTICS = {"ref_mse_winner", "ref_mse_loser", "aaf_rate", "implicit_acc", "logit_p05", "logit_p50", "logit_p95"}


@pytest.fixture
def five(trained: Trained, pickapic: Path) -> dict[str, Path]:
    """One run of each method, on the same pairs."""
    return {method: trained(**THREE, **{"seppo.method": method, "seppo.data.source": str(pickapic)})
            for method in ("seppo", "spin", "ditto", "dpo", "sft")}


def test_five_methods_train_five_models(five: dict[str, Path], sd: Path) -> None:
    models = {"base": unet_of(sd)} | {method: weights(run) for method, run in five.items()}
    names = list(models)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert apart(models[one], models[other]) > 1e-4, (one, other)


def test_methods_have_their_references(five: dict[str, Path]) -> None:
    picked = {method: column(run, "reference") for method, run in five.items()}
    assert picked == {"seppo": [0, 0, 0, 0, 1, 1], "spin": [0, 0, 1, 1, 2, 2], "ditto": [0] * 6, "dpo": [0] * 6, "sft": [None] * 6}
    for method, run in five.items():
        pool = sorted(path.name for path in (run / "pool").glob("*")) if (run / "pool").exists() else []
        assert pool == ([] if method == "sft" else [f"policy_{k:05}.safetensors" for k in range(4)]), method


def test_only_seppo_flips(five: dict[str, Path]) -> None:
    assert any(rate < 1 for rate in column(five["seppo"], "aaf_rate"))
    for method in ("spin", "ditto", "dpo"):  # every sign is -1, which is no rate of a flipper
        assert not any("aaf_rate" in row for row in rows(five[method])), method


def test_losers_are_sampled_or_read(five: dict[str, Path]) -> None:
    for method, run in five.items():
        sampled = [seconds > 0 for seconds in column(run, "seconds_sampling")]
        # a method that samples does so for each update
        assert sampled == ([True] * 6 if method in ("seppo", "spin", "ditto") else [False] * 6), method
    # all three train against the same policy on the same winners at first; the data's losers are other pictures
    first = {method: rows(run)[0] for method, run in five.items()}
    assert first["seppo"]["model_mse_loser"] == first["spin"]["model_mse_loser"] == first["ditto"]["model_mse_loser"]
    assert first["dpo"]["model_mse_loser"] != first["seppo"]["model_mse_loser"]
    for row in first.values():
        assert row["model_mse_winner"] == pytest.approx(first["seppo"]["model_mse_winner"], rel=1e-5)


def test_sft_has_no_statistics_of_pairs(five: dict[str, Path]) -> None:
    for row in rows(five["sft"]):
        assert not STATISTICS & row.keys() and "model_mse_loser" not in row
        assert row["loss"] == row["model_mse_winner"]
    assert STATISTICS - {"aaf_rate"} < rows(five["dpo"])[0].keys()


def test_ties_are_dropped(five: dict[str, Path]) -> None:
    for method, run in five.items():
        assert "12 demonstrations" in (run / "final" / "README.md").read_text(), method  # of 14 rows, 2 of them ties
        assert (run / "skipped.jsonl").read_text() == "", method  # not bad rows


def test_methods_are_rows_of_one_table(five: dict[str, Path], trained: Trained, pickapic: Path) -> None:
    """SPIN and DITTO are SePPO with another reference and no flipper, to the bit."""
    for method, reference in (("spin", "latest"), ("ditto", "initial")):
        changes = {"seppo.data.source": str(pickapic), "seppo.reference": reference, "seppo.flipper": "none"}
        spelled_out = trained(**THREE, **changes)
        assert identical(weights(spelled_out), weights(five[method]))


@pytest.mark.parametrize("strategy", ["uniform", "latest", "initial"])
def test_reference_strategies(strategy: str, trained: Trained) -> None:
    run = trained(**THREE, **{"seppo.reference": strategy})
    assert column(run, "reference") == [pick(strategy, k, 0) for k in (1, 2, 3) for _ in range(2)]
    against_itself = [row for row in rows(run) if row["update"] % 2 and row["reference"] == row["iteration"] - 1]
    assert len(against_itself) == {"uniform": 1, "latest": 3, "initial": 1}[strategy]
    for row in against_itself:  # the policy still is its reference
        assert (row["loss"], row["aaf_rate"], row["implicit_acc"]) == (pytest.approx(math.log(2), abs=1e-12), 1, 0)
        assert row["logit_p05"] == row["logit_p95"] == 0
    for row in rows(run):
        if row not in against_itself:
            assert row["logit_p05"] < row["logit_p95"]


def test_reference_strategies_train_different_models(trained: Trained) -> None:
    models = [weights(trained(**THREE, **{"seppo.reference": strategy})) for strategy in ("uniform", "latest", "initial")]
    for i in range(3):
        assert apart(models[i], models[i - 1]) > 1e-4


def test_flippers(trained: Trained) -> None:
    # a rate at which the second update already meets winners that the first one made worse
    runs = {flipper: trained(**{"seppo.flipper": flipper, "optimizer.params.lr": 1e-2}) for flipper in ("aaf", "indicator", "none")}
    first = [{name: value for name, value in rows(run)[0].items() if "second" not in name and "_per_s" not in name
              and "peak" not in name and name != "aaf_rate"} for run in runs.values()]
    assert first[0] == first[1] == first[2]  # all signs are ties, so all three begin with Diffusion-DPO's update
    second = {flipper: rows(run)[1] for flipper, run in runs.items()}
    assert second["aaf"]["model_mse_winner"] == second["indicator"]["model_mse_winner"] == second["none"]["model_mse_winner"]
    assert second["aaf"]["aaf_rate"] == second["indicator"]["aaf_rate"] < 1 and "aaf_rate" not in second["none"]
    assert len({row["loss"] for row in second.values()}) == 3
    models = [weights(run) for run in runs.values()]
    for i in range(3):
        assert apart(models[i], models[i - 1]) > 1e-4


def test_choose_random_takes_either_image(trained: Trained, pickapic: Path, tmp_path: Path, sd: Path) -> None:
    choices = {}
    for choose, needs_loser in (("winner", True), ("random", False)):
        data = Data(source=str(pickapic), resolution=16, flip=False, choose=choose, cache_dir=str(tmp_path / choose))
        choices[choose] = build_cache(open_source(data, needs_loser, 0), open_model(str(sd)), data, seed=0,
                                      needs_loser=needs_loser, output_dir=tmp_path, progress=False)
    pairs, chosen = (choices[choose].rows(range(12)) for choose in ("winner", "random"))
    assert pairs.keys == chosen.keys
    is_winner, is_loser = ((chosen.mean == either).flatten(1).all(dim=1) for either in (pairs.mean, pairs.loser_mean))
    assert (is_winner != is_loser).all() and 0 < is_winner.sum() < 12

    on_winners = trained(**THREE, **{"seppo.method": "seppo", "seppo.data.source": str(pickapic)})
    on_either = trained(**THREE, **{"seppo.method": "seppo", "seppo.data.source": str(pickapic), "seppo.data.choose": "random"})
    assert apart(weights(on_winners), weights(on_either)) > 1e-4


def test_shared_noise_is_another_run(trained: Trained) -> None:
    independent, shared = trained(), trained(**{"seppo.noise": "shared"})
    one, other = rows(independent)[0], rows(shared)[0]
    assert one["model_mse_winner"] == other["model_mse_winner"]  # the winner's noise is the same
    assert one["model_mse_loser"] != other["model_mse_loser"]
    assert apart(weights(independent), weights(shared)) > 1e-4


def test_caption_dropout(trained: Trained) -> None:
    """The policy is no longer told the captions; the reference, which makes the losers, still is."""
    told, untold = trained(), trained(**{"seppo.caption_dropout": 1.0})
    assert rows(told)[0]["model_mse_winner"] != rows(untold)[0]["model_mse_winner"]
    assert apart(weights(told), weights(untold)) > 1e-4


def test_posterior_mean_is_another_run(trained: Trained) -> None:
    sampled, mean = trained(), trained(**{"seppo.data.posterior": "mean"})
    assert rows(sampled)[0]["model_mse_loser"] == rows(mean)[0]["model_mse_loser"]
    assert rows(sampled)[0]["model_mse_winner"] != rows(mean)[0]["model_mse_winner"]
    assert apart(weights(sampled), weights(mean)) > 1e-4


def test_window_of_an_iteration_trains_the_same_model(trained: Trained) -> None:
    whole = trained(**{"seppo.sampler.window": "iteration"})
    assert identical(weights(trained()), weights(whole))
    assert [seconds > 0.001 for seconds in column(whole, "seconds_sampling")] == [True, False, True, False]


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++", "pndm", "unipc", "euler"])
def test_every_solver_trains(solver: str, trained: Trained, sd: Path) -> None:
    run = trained(**{"seppo.sampler.solver": solver})
    assert apart(weights(run), unet_of(sd)) > 1e-3
    assert all(math.isfinite(loss) for loss in column(run, "loss")) and column(run, "skipped_steps")[-1] == 0
    assert json.loads((run / "config.json").read_text())["seppo"]["sampler"]["solver"] == solver


def test_solvers_make_different_losers(trained: Trained) -> None:
    solvers = ("ddim", "dpmsolver++", "pndm", "unipc", "euler")
    first = [rows(trained(**{"seppo.sampler.solver": solver}))[0] for solver in solvers]
    assert len({row["model_mse_winner"] for row in first}) == 1
    assert len({row["model_mse_loser"] for row in first}) == 5


def test_prediction_types_have_their_targets(trained: Trained, tmp_path: Path, sd: Path) -> None:
    """The same network, told to predict v, errs by another amount on the same noisy latents."""
    velocity = trained(**{"seppo.model.path": str(tiny_sd(tmp_path / "v", "v_prediction", **NARROW))})
    assert identical(unet_of(sd), unet_of(tmp_path / "v"))
    assert rows(velocity)[0]["model_mse_winner"] != rows(trained())[0]["model_mse_winner"]
    assert "v_prediction" in (velocity / "final" / "scheduler" / "scheduler_config.json").read_text()
    assert apart(weights(velocity), weights(trained())) > 1e-4

