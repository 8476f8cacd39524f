"""What the watching trainer keeps, how well an error tells, and the text on it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import identical, steady_rows, weights
from safetensors.torch import load_file

from benchmarks.by_seed import Run
from benchmarks.flipper.__main__ import main
from benchmarks.flipper.comparisons import COMPARISONS, ENDS, MEASURES
from benchmarks.flipper.plots import figures
from benchmarks.flipper.readme import flipper
from benchmarks.flipper.report import headline, judged, report, verdict
from benchmarks.flipper.runs import BASE, DRAWS, LEVELS, METHODS, TIMES, WATCHED, Settings, overrides
from benchmarks.flipper.telling import telling, told, within
from benchmarks.flipper.views import Measures, Views
from benchmarks.flipper.watching import Watching, evenly, watched_updates
from benchmarks.intervals import Interval
from seppo_fast.configfile import load_config, parse_config
from seppo_fast.quickstart.digits import split_digits
from seppo_fast.run import run
from seppo_fast.signals import StopSignals

ITERATIONS, UPDATES, PAIRS = 2, 4, 40


def views(tells: float, seed: int = 0) -> Views:
    """Pairs of two updates an iteration whose excess has `tells` times as much of the truth as of noise."""
    random = np.random.default_rng(seed)
    updates = np.repeat([1.0, 3.0, 5.0, 7.0], PAIRS)
    truth = random.normal(size=len(updates))
    same, other = (tells * truth + random.normal(size=(n, len(updates))) for n in (DRAWS[-1], TIMES))
    same[1:, updates > 5], other[1:, updates > 5] = np.nan, np.nan  # of the last update there is one draw alone
    return Views(same, other, np.where(same[0] > 0, 1.0, -1.0), random.integers(0, 1000, len(updates)).astype(float), updates,
                 np.zeros_like(updates), {measure: truth for measure in MEASURES})


def result(tells: float, seeds: int = 3, sharper: float = 0.0) -> dict[str, Any]:
    """Runs of every method; signs of more noises end `sharper` above."""
    runs: list[Run] = []
    for seed in range(seeds):
        for place, method in enumerate((BASE, *METHODS)):
            score = 0.5 + 0.1 * seed + sharper * max(0, place - 1) + 0.003 * ((seed + place) % 2)
            row: Run = {"seed": seed, "method": method, "commit": "abc", "seconds": 9.0, "cpu_seconds": 8.0,
                        "points": [{"update": 8, **dict.fromkeys(ENDS, score)}]}
            row |= {} if method == BASE else {"aaf_rate": [0.6, 0.7]}
            runs.append(row | ({"told": told(views(tells, seed), ITERATIONS, UPDATES, DRAWS, LEVELS)} if method == WATCHED else {}))
    return {"machine": {"cpu": "Some CPU"}, "versions": {"torch": "2.99"}, "seconds": {"processor": 120}, "runs": runs,
            "commits_of_runs": ["abc"],
            "settings": vars(Settings()) | {"iterations": ITERATIONS, "seeds": seeds, "side_by_side": 2}}


def test_an_error_that_tells_all_and_one_that_tells_nothing() -> None:
    better, groups = np.array([1.0, -1.0, 2.0, -2.0, 0.0]), np.zeros(5)
    right = telling(better, better, groups)
    assert right == {"base": 0.5, "said": 0.5} | dict.fromkeys(("precision", "recall", "balanced", "auc", "signed", "within"), 1.0)
    assert telling(-better, better, groups)["auc"] == 0.0
    half = telling(np.array([1.0, 1.0, -1.0, -1.0, 9.0]), better, groups)  # the last pair is a tie of the judge's
    assert (half["precision"], half["recall"], half["balanced"], half["auc"], half["signed"]) == (0.5,) * 5
    never = telling(-np.ones(5), better, groups)  # every sign is -1
    assert never["precision"] is None and never["recall"] == 0.0 and never["balanced"] == 0.5
    assert set(telling(better, np.ones(5), groups).values()) == {None}
    assert telling(better, better, groups, better > 0)["auc"] is None


def test_a_policy_that_gets_better_says_nothing_within_an_update() -> None:
    """In the second update errors are lower and the reference's samples seldom better: over all pairs that looks like skill."""
    random = np.random.default_rng(0)
    groups = np.repeat([0.0, 1.0], 2000)
    truth, score = random.random(4000) < np.where(groups == 0, 0.8, 0.2), random.normal(size=4000) - 3 * groups
    found = telling(score, np.where(truth, 1.0, -1.0), groups)
    assert found["auc"] is not None and found["auc"] > 0.7 and found["within"] == pytest.approx(0.5, abs=0.03)
    assert found["balanced"] is not None and found["balanced"] > 0.6 and found["signed"] == pytest.approx(0.5, abs=0.03)
    assert within(np.array([True, False]), np.array([1.0, 0.0]), np.array([0.0, 1.0])) is None


def test_more_noises_tell_more_where_there_is_something_to_tell() -> None:
    found = told(views(0.3), ITERATIONS, UPDATES, DRAWS, LEVELS)
    assert found["pairs"] == 4 * PAIRS and found["agreeing"]["64"] == 1.0 > found["agreeing"]["1"] > 0.5
    of = found["measures"]["prompt"]
    assert [of["same"][n]["auc"] for n in ("1", "64")] == sorted(of["same"][n]["auc"] for n in ("1", "64"))
    assert of["same"]["1"] != of["all"] and of["same"]["64"]["auc"] > 0.9 and list(of["other"]) == ["1", "2", "4", "16"]
    assert found["averaged"] == 3 * PAIRS and of["other"]["16"]["auc"] > of["same"]["1"]["auc"]
    assert len(of["levels"]) == LEVELS and len(of["iterations"]) == ITERATIONS


@pytest.mark.parametrize(("tells", "words"), [(2.0, "**The sign is better than chance by 3"),
                                              (0.0, "**The sign is no better than chance**"),
                                              (-2.0, "**The sign is worse than chance**")])
def test_the_verdict_is_plain(tells: float, words: str, tmp_path: Path) -> None:
    text = report(result(tells))
    assert text.startswith(words) and headline(result(tells)).count("**") == 0
    assert "2 minutes of processor time on Some CPU" in text and "commit `abc`" in text
    figures(tmp_path, result(tells))
    (tmp_path / "flipper.json").write_text(json.dumps(result(tells)))
    assert flipper(tmp_path).startswith(text.rstrip()) and (tmp_path / "flipper.png").stat().st_size > 10_000


def test_the_runs_that_act_on_more_noises_are_compared_by_seed() -> None:
    found = {comparison.sentence: each for comparison, each in judged(result(0.0, sharper=0.05))}
    assert len(found) == len(COMPARISONS)
    assert found["signs of 16 noises end better than signs of one: cleanliness"].mean == pytest.approx(0.1, abs=0.004)
    assert "| signs of 16 noises | " in report(result(0.0)) and "Where the sentence holds:" in report(result(0.0))
    assert [verdict(each) for each in (Interval(0.1, 0.05), Interval(-0.1, 0.05), Interval(0.1, 0.2), Interval(0.1, None))] == [
        "above", "below", "open", "open"]


def test_one_seed_and_missing_runs(tmp_path: Path) -> None:
    assert flipper(tmp_path).startswith("Not measured yet (`python -m benchmarks.flipper --out benchmarks/results`")
    alone = result(2.0, seeds=1)
    assert report(alone).startswith("One seed tells nothing") and {verdict(each) for _, each in judged(alone)} == {"open"}
    alone["runs"] = [run for run in alone["runs"] if run["method"] in (BASE, "draws_4")]
    assert judged(alone) == [] and "| signs of 4 noises | " in report(alone)
    figures(tmp_path, alone)
    assert not (tmp_path / "flipper.png").exists()


def test_every_method_is_seppo_w_with_its_noises(tmp_path: Path) -> None:
    for method, noises in METHODS.items():
        ours = load_config("quickstart.json", overrides(tmp_path, 3, method, Settings())).seppo
        assert (ours.aaf_draws, ours.flipper, ours.reference, ours.seed) == (noises, "aaf", "uniform", 3)
        assert Path(ours.output_dir) == tmp_path / "seed_3" / method


def test_the_watched_updates_are_spread_and_not_the_first() -> None:
    assert watched_updates(2, 12, 4) == [1, 4, 7, 10, 13, 16, 19, 22]
    for wanted in range(1, 7):
        found = watched_updates(3, 12, wanted)
        assert len({*found}) == 3 * wanted and not any(update % 12 == 0 for update in found)
        for few in range(1, wanted + 1):
            some = evenly(found, wanted, few)
            assert {*some} <= {*found} and [update // 12 for update in some] == [k for k in range(3) for _ in range(few)]


@pytest.mark.parametrize(("argv", "said"), [(["--set", "watched=7"], "--set watched=7: at most 6 of an iteration's 12 updates"),
                                            (["--set", "averaged=7"], "--set averaged=7: only 6 updates of an iteration"),
                                            (["--methods", "draws_2"], "--methods draws_2: not known"),
                                            (["--bases", "nowhere"], "--bases nowhere")])
def test_bad_input_is_one_message(argv: list[str], said: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--work", str(tmp_path / "work"), *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_watching_sees_the_pairs_and_changes_nothing(settings: Any, train: Any, ranks: Any, tmp_path: Path) -> None:
    """In the third update the reference is the policy itself: no error differs, and both draw the same from the same noise."""
    plain = train(settings(**{"seppo.reference": "latest"}))
    raw = settings(**{"seppo.reference": "latest", "seppo.output_dir": str(tmp_path / "watched")})
    make = partial(Watching, views=tmp_path / "views", watched=[1, 2, 3], averaged=[1, 2],
                   draws=(5, 3))
    final = run(parse_config(raw), None, ranks, StopSignals(), make)
    assert identical(weights(plain), weights(final.parent)) and steady_rows(plain) == steady_rows(final.parent)

    one, same, last = (load_file(tmp_path / "views" / f"update_0000000{update}.safetensors") for update in (1, 2, 3))
    assert one["same"].shape == (5, 8) and one["other"].shape == (3, 8) and last["same"].shape == last["other"].shape == (1, 8)
    assert one["own"].shape == one["reference"].shape
    assert torch.equal(one["same"][0], one["other"][0]) and not torch.equal(one["same"][1], one["other"][1])
    assert torch.equal(torch.where(one["same"][0] > 0, 1.0, -1.0), one["sign"]) and one["sign"].unique().numel() == 2
    assert not torch.equal(one["own"], one["reference"]) and set(one["label"].tolist()) <= {1, 2, 3}
    assert one["drawer"].tolist() == [0] * 8 and same["drawer"].tolist() == [1] * 8
    assert not same["same"].any() and not same["other"].any() and torch.equal(same["own"], same["reference"])


@pytest.mark.slow
def test_the_measures_know_a_digit_from_another_and_from_none() -> None:
    digits, _ = split_digits(3)
    measures, few = Measures(3), slice(100)
    real = measures(digits.pixels[few], digits.labels[few])
    wrong = measures(digits.pixels[few], (digits.labels[few] + 1) % 10)
    assert (real["prompt"] > wrong["prompt"]).mean() > 0.95 and (real["distance"] == wrong["distance"]).all()
    grey = measures(torch.full((100, 3, 16, 16), 0.5), digits.labels[few])
    assert (real["distance"] > grey["distance"]).all()
