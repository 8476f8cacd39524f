"""`seppo.data.hold_out`: demonstrations that are never trained on, and the policy's errors on them."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from forked import Forks, Strike
from outcomes import column, identical, rows, weights

from seppo_fast.configfile import batch_plan, load_config, parse_config
from seppo_fast.data.latents import LatentCache
from seppo_fast.data.order import Order, split
from seppo_fast.errors import UserError
from seppo_fast.models.published import published_model
from seppo_fast.planning.cost import estimate
from seppo_fast.planning.dry_run import dry_run
from seppo_fast.planning.time_plan import work_of
from seppo_fast.profiling.profiled import shortened
from seppo_fast.seeds import generator, normal
from seppo_fast.training.held_out import DRAWS, columns

Trained = Callable[..., Path]
PLAIN = {"seppo.data.flip": False, "seppo.data.posterior": "mean"}
HELD = {"seppo.data.hold_out": 5, "seppo.evaluation": {"every": 2}}
GAIN, ACCURACY = "heldout_winner_gain", "heldout_implicit_acc"


def measured(run: Path, name: str = GAIN) -> dict[int, float]:
    """The evaluations' values by update."""
    return {row["update"]: row[name] for row in rows(run) if "loss" not in row}


@pytest.mark.parametrize(("wanted", "count"), [(5, 5), (0.25, 6), (0.02, 1), (1, 1), (23, 23)])
def test_a_split_is_seeded_and_has_all_rows_once(wanted: float, count: int) -> None:
    trained_on, held = split(24 if wanted != 0.02 else 50, wanted, 3)
    assert len(held) == count and sorted([*trained_on, *held]) == list(range(24 if wanted != 0.02 else 50))
    assert held == split(len(trained_on) + count, wanted, 3)[1]
    assert count in (1, 23) or held != split(len(trained_on) + count, wanted, 4)[1]
    assert {Order(24, 0, trained_on).row(slot) for slot in range(2 * len(trained_on))} == {*trained_on}


@pytest.mark.parametrize(("wanted", "words"), [
    (24, "there are 24 demonstrations"), (500, "there are 24 demonstrations"), (0.001, "of 24 demonstrations that is 0"),
    (0.99, "of 24 demonstrations that is 24")])
def test_something_stays_on_both_sides(wanted: float, words: str, settings: Any, train: Any) -> None:
    raw = settings(**HELD | {"seppo.data.hold_out": wanted})
    for attempt in (lambda: split(24, wanted, 0), lambda: dry_run(parse_config(raw), 1), lambda: train(raw)):
        with pytest.raises(UserError) as caught:
            attempt()
        assert f"seppo.data.hold_out={wanted}: {words}" in str(caught.value)


def test_training_is_that_of_the_other_demonstrations_alone(trained: Trained, settings: Any, train: Any, demonstrations: Path,
                                                            tmp_path: Path) -> None:
    kept, _ = split(24, 5, 0)
    lines = (demonstrations / "metadata.jsonl").read_text().splitlines()
    (tmp_path / "metadata.jsonl").write_text("".join(lines[row] + "\n" for row in kept))
    for file in demonstrations.glob("*.png"):
        (tmp_path / file.name).symlink_to(file)
    alone = train(settings(**PLAIN, **{"seppo.data.source": str(tmp_path), "seppo.output_dir": str(tmp_path / "run")}))
    run = trained(**PLAIN, **HELD)
    assert identical(weights(run), weights(alone)) and not identical(weights(run), weights(trained(**PLAIN)))
    assert "19 demonstrations" in (run / "final" / "README.md").read_text()


def test_the_gain_is_what_diffusers_computes(trained: Trained, settings: Any, sd: Path, tmp_path: Path) -> None:
    """With the pictures' means as latents, from the noise and timesteps that the seeds say."""
    run = trained(**PLAIN, **HELD, **{"seppo.data.cache_dir": str(tmp_path / "cache")})
    (folder,) = (tmp_path / "cache").iterdir()
    cache, seed = LatentCache(folder), generator(0, "held out").initial_seed()
    order = Order(24, seed, split(24, 5, 0)[1])
    scheduler = DDPMScheduler.from_pretrained(sd / "scheduler")
    errors = []
    for model in (sd, run / "final"):
        unet = UNet2DConditionModel.from_pretrained(model / "unet")
        total = 0.0
        for slot in range(DRAWS * 5):
            row, noise = cache.rows([order.row(slot)]), normal(cache.shape, seed, "noise", [slot])
            timestep = torch.randint(1000, (1,), generator=generator(seed, "timestep", slot))
            latents = scheduler.add_noise(row.mean * 0.18215, noise, timestep)
            with torch.no_grad():
                answer = unet(latents, timestep, cache.embeddings(row.prompts)["prompt_embeds"]).sample
            total += (answer - noise).square().mean().item()
        errors.append(total / (DRAWS * 5))
    values = measured(run)
    assert list(values) == [0, 2, 4] and values[0] == 0.0 and abs(values[4]) > 1e-5
    assert values[4] == pytest.approx(errors[0] - errors[1], abs=2e-7)
    accuracy = measured(run, ACCURACY)
    assert accuracy[0] == 0.0 and all(0 <= share <= 1 for share in accuracy.values()) and len(set(accuracy.values())) > 1


@pytest.mark.parametrize(("changes", "names"), [
    ({"seppo.method": "sft"}, {GAIN}), ({"seppo.method": "dpo"}, {GAIN, ACCURACY}),
    ({"seppo.model.lora": {"rank": 2}, "optimizer.params.lr": 1e-2}, {GAIN, ACCURACY}),
    ({"seppo.sampler.window": "iteration", "seppo.reference_score": "rollout"}, {GAIN, ACCURACY}),
], ids=lambda changes: " ".join(map(str, changes.values())) if isinstance(changes, dict) else "")
def test_training_does_not_notice(changes: dict[str, Any], names: set[str], trained: Trained, pickapic: Path) -> None:
    """However often is measured, and in the middle of iterations, too."""
    if changes.get("seppo.method") == "dpo":
        changes = changes | {"seppo.data.source": str(pickapic)}
    often, seldom = (trained(**HELD | {"seppo.evaluation": {"every": every}}, **changes) for every in (1, 4))
    assert identical(weights(often), weights(seldom))
    assert list(measured(often)) == [0, 1, 2, 3, 4] and list(measured(seldom)) == [0, 4]
    for name in names:
        assert measured(often, name)[0] == 0.0 and measured(often, name)[4] == measured(seldom, name)[4]
    assert measured(often)[4] != 0.0
    assert all({name for name in row if name.startswith("heldout")} == names for row in rows(often) if "loss" not in row)


def test_two_ranks_measure_what_one_does(train_on_ranks: Any, train: Any, settings: Any, tmp_path: Path) -> None:
    """Of five demonstrations one rank has three."""
    def raw(name: str, **changes: Any) -> dict[str, Any]:
        return settings(**HELD | changes, **{"seppo.output_dir": str(tmp_path / name), "seppo.iterations": 1,
                                             "optimizer.params.eps": 1e-5, "seppo.beta": 300.0})

    sft = {"seppo.method": "sft"}
    one, alone = train(raw("one")), train(raw("sft", **sft))
    two, three, fine_tuned = train_on_ranks([raw("two"), raw("zero 3", zero_optimization={"stage": 3}), raw("sft 2", **sft)])
    for run, other in ((two, one), (three, one), (fine_tuned, alone)):
        assert measured(run) == pytest.approx(measured(other), rel=1e-3, abs=1e-7), run.name
        assert abs(measured(other)[2]) > 1e-5
    assert measured(two, ACCURACY) == measured(three, ACCURACY) == measured(one, ACCURACY)


def test_stopped_in_an_evaluation(forks: Forks, settings: Any, tmp_path: Path) -> None:
    """Resumed, the run has the same rows and weights as one that was never stopped; SFT too, whose start is in no pool."""
    def run(name: str, method: str, strike: Strike | None = None, *arguments: str) -> Path:
        raw = settings(**HELD, **{"seppo.output_dir": str(tmp_path / name), "seppo.checkpoint.every": 1, "seppo.method": method})
        forks.run(raw, *arguments, strike=strike)
        return tmp_path / name

    objective = "seppo_fast.training.held_out:HeldOut.__call__"
    for method, strikes in (("seppo", ((1, signal.SIGTERM), (2, signal.SIGKILL))), ("sft", ((3, signal.SIGTERM),))):
        whole = run(f"{method} whole", method)
        for call, signum in strikes:
            name = f"{method} {call}"
            stopped = run(name, method, Strike(objective, call, signum))
            assert not (stopped / "final").exists(), name
            run(name, method, None, "--resume", "auto")
            assert measured(stopped) == measured(whole) and len(measured(whole)) == 3, name
            assert method == "sft" or measured(stopped, ACCURACY) == measured(whole, ACCURACY), name
            assert column(stopped, "update") == column(whole, "update") and identical(weights(stopped), weights(whole)), name


def test_what_is_held_out_cannot_change_in_a_run(train: Any, settings: Any) -> None:
    train(settings(**HELD))
    with pytest.raises(UserError, match="seppo.data.hold_out: 5 there, 6 now"):
        train(settings(**HELD | {"seppo.data.hold_out": 6}), resume="auto")


def test_it_ends_where_it_overfits_and_the_best_stays(train: Any, settings: Any, capsys: pytest.CaptureFixture[str],
                                                      tmp_path: Path) -> None:
    """At a rate that destroys the policy, no policy is better than the first."""
    evaluation = {"every": 1, "patience": 2, "keep_best": True}
    run = train(settings(**HELD | {"seppo.evaluation": evaluation}, **{"optimizer.params.lr": 0.1}))
    said = capsys.readouterr().out
    assert "24 demonstrations are usable, of which 5 are held out" in said
    assert "stopped early: the last 2 evaluations brought no better heldout_winner_gain than 0.0 after 0 updates" in said
    assert list(measured(run)) == [0, 1, 2] and measured(run)[1] < 0
    assert "best is not written: none is better than the model that training began with" in said
    watched = train(settings(**HELD | {"seppo.evaluation": {"every": 1, "keep_best": True, "watch": ACCURACY}},
                             **{"seppo.output_dir": str(tmp_path / "watched")}))
    values = measured(watched, ACCURACY)
    best = max(values, key=values.get)
    assert best > 0 and f"{best} optimizer updates" in (watched / "best" / "README.md").read_text()


def test_monitors_have_it(train: Any, settings: Any, tmp_path: Path) -> None:
    raw = settings(**HELD, csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "job"})
    run = train(raw)
    train(raw, resume="auto")
    (file,) = (tmp_path / "job").glob("seppo_heldout_winner_gain.csv")
    assert [float(line.split(",")[1]) for line in file.read_text().splitlines()[1:]] == pytest.approx([*measured(run).values()])


@pytest.mark.parametrize(("changes", "words"), [
    ({"seppo.evaluation": {}}, "data.hold_out needs evaluation.every"),
    ({"seppo.data.hold_out": 0}, "seppo.data.hold_out: expected a whole number above 0, or a share between 0 and 1 (got 0)"),
    ({"seppo.data.hold_out": 1.0}, "a share between 0 and 1 (got 1.0)"),
    ({"seppo.data.hold_out": True}, "a share between 0 and 1 (got True)"),
    ({"seppo.evaluation": {"every": 1, "watch": "pickscore"}},
     "watch='pickscore' is none of the scores (heldout_winner_gain, heldout_implicit_acc)"),
    ({"seppo.evaluation": {"every": 1, "watch": ACCURACY}, "seppo.method": "sft"}, "is none of the scores (heldout_winner_gain)"),
    ({"seppo.evaluation": {"every": 1, "watch": GAIN, "prompts": ["a cat"]}, "seppo.data.hold_out": None},
     "watch='heldout_winner_gain' is none of the scores (pickscore)"),
])
def test_a_section_that_makes_no_sense(settings: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(settings(**HELD | changes))
    assert words in str(caught.value)


@pytest.mark.slow
def test_the_plan_counts_it(settings: Any) -> None:
    said = dry_run(parse_config(settings(**HELD)), 1)
    line = next(line for line in said.splitlines() if line.strip().startswith("held out"))
    assert "5 of 24 demonstrations, never trained on" in line and "every 2 updates" in line
    assert "pickscore" not in said
    config = load_config("ds_a100.json", ["seppo.data.hold_out=100", "seppo.evaluation.every=30"])
    batch = batch_plan(config.deepspeed, 8)
    cost = estimate(published_model(config.seppo.model.path), config, batch)
    with_it, without = work_of(config, batch, cost, 100), work_of(config, batch, cost)
    assert with_it.pairs * (with_it.sampling - without.sampling) == pytest.approx(100 * cost.sampling)
    assert with_it.pairs * (with_it.training - without.training) == pytest.approx(8 * 100 * DRAWS * 2 * cost.forward)


def test_it_is_left_out_of_a_profile(settings: Any, tmp_path: Path) -> None:
    config = shortened(parse_config(settings(**HELD)), tmp_path, 2)
    assert config.seppo.data.hold_out is None and config.seppo.evaluation.every == 0


def test_errors_that_are_not_finite_are_no_gain() -> None:
    assert columns(math.nan, 0.5, 0.1) == {GAIN: None, ACCURACY: None}
    assert json.dumps(columns(0.25, None, 0.5)) == json.dumps({GAIN: 0.25})
