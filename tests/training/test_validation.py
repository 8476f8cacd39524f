"""`seppo.evaluation`: scores on the way, the best policy kept, an early end; and what these must not change in training."""

import json
import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from forked import Forks, Strike
from outcomes import column, identical, rows, weights
from PIL import Image
from tiny import tiny_clip, tiny_sd

from seppo_fast.configfile import parse_config
from seppo_fast.errors import UserError
from seppo_fast.evaluate import parse_arguments
from seppo_fast.evaluation.arguments import request_of
from seppo_fast.evaluation.run import evaluate
from seppo_fast.planning.dry_run import dry_run

PROMPTS = ["a handwritten one", "a red cat", "a photo of the sky"]
SAMPLING, SCORING = "seppo_fast.training.validation:render", "seppo_fast.training.validation:score_all"
ROUNDING = 2e-3  # of a score of 16x16 pixels, when one of them is rounded the other way


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PickScore of the real kind, tiny."""
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def keys(clip: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`keys(every=2)`: the section by PickScore on three prompts, and what was changed in it; no hub is asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    known = {"prompts": PROMPTS, "weights": {"pickscore": str(clip), "pickscore.tokenizer": str(clip)}, "every": 1}
    return lambda **changes: {"seppo.evaluation": known | changes}


def scored(run: Path, score: str = "pickscore") -> dict[int, float]:
    """The evaluations' values by update."""
    return {row["update"]: row[f"eval_{score}"] for row in rows(run) if "loss" not in row}


def assert_alike(one: Path, other: Path, count: int) -> None:
    """The same pictures to a grey level: on some processors the last bits differ between a pipeline from files and the trainer."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir()) and len(names) == count
    for name in names:
        first, second = (np.asarray(Image.open(folder / name)).astype(int) for folder in (one, other))
        assert abs(first - second).max() <= 1, name


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def values_by_command(models: dict[str, Path], clip: Path, out: Path, ranks: Any) -> list[float]:
    """PickScores by `python -m seppo_fast.evaluate` with the settings of the run."""
    (out.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["--models", *(f"{name}={path}" for name, path in models.items()), "--prompts", str(out.parent / "prompts.txt"),
                 "--out", str(out), "--steps", "3", "--guidance-scale", "2", "--resolution", "16", "--per-prompt", "2", "--scores",
                 "pickscore", "--weights", f"pickscore={clip}", f"pickscore.tokenizer={clip}"]
    result = evaluate(request_of(parse_arguments(arguments), ranks, print), ranks, lambda line: None)
    return [row["mean"] for row in result["table"]]


def test_the_values_are_the_commands(trained: Any, keys: Any, clip: Path, ranks: Any, tmp_path: Path) -> None:
    base = tiny_sd(tmp_path / "base")  # a wider network than elsewhere: its scores move further
    run = trained(**keys(every=2, per_prompt=2), **{"seppo.model.path": str(base)})
    values = scored(run)
    assert list(values) == [0, 2, 4]
    assert [row["eval_samples"] for row in rows(run) if "loss" not in row] == [6, 6, 6]
    by_command = values_by_command({"base": base, "tuned": run / "final"}, clip, tmp_path / "out", ranks)
    assert [values[0], values[4]] == pytest.approx(by_command, rel=ROUNDING)
    assert abs(values[4] - values[0]) > 50 * ROUNDING and len(set(values.values())) == 3
    samples = run / "evaluation" / "samples"
    assert_alike(samples / "update_00000004", tmp_path / "out" / "samples" / "tuned", 6)
    assert sorted(path.name for path in samples.iterdir()) == [f"update_{update:08d}" for update in (0, 2, 4)]
    assert all(len(list(folder.glob("*.png"))) == 6 for folder in samples.iterdir())


@pytest.mark.parametrize("changes", [
    {}, {"seppo.sampler.window": "iteration", "seppo.reference_score": "rollout"}, {"seppo.method": "sft"},
    {"seppo.model.lora": {"rank": 2}},
], ids=lambda changes: " ".join(map(str, changes.values())) or "seppo")
def test_training_does_not_notice(trained: Any, keys: Any, changes: dict[str, Any]) -> None:
    """Though the policy passes through the reference model, in the middle of iterations, too."""
    evaluated = trained(**keys(), **changes)
    assert identical(weights(evaluated), weights(trained(**changes))) and list(scored(evaluated)) == [0, 1, 2, 3, 4]


def test_two_ranks_measure_what_one_does(train_on_ranks: Any, settings: Any, keys: Any, clip: Path, tmp_path: Path) -> None:
    """One of two ranks has two prompts and the other one, in batches of one; with ZeRO-3 each has a part of the policy."""
    evaluation = keys(scores=["pickscore", "vendi"], every=2,
                      weights={name: str(clip) for name in ("pickscore", "pickscore.tokenizer", "vendi")})

    def raw(name: str, stage: int = 0) -> dict[str, Any]:
        return settings(**{"seppo.output_dir": str(tmp_path / name), "seppo.sampler.batch_size": 1, "seppo.iterations": 1,
                           "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage},
                           **evaluation})

    [one] = train_on_ranks([raw("one")], ranks=1)
    for two in train_on_ranks([raw("two"), raw("zero 3", stage=3)], ranks=2):
        for score in ("pickscore", "vendi"):
            assert scored(two, score)[0] == pytest.approx(scored(one, score)[0], rel=1e-5)
            assert scored(two, score) == pytest.approx(scored(one, score), rel=ROUNDING), two.name


def test_it_ends_where_it_gets_no_better(trained: Any, keys: Any, train: Any, settings: Any,
                                         capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """At a learning rate that moves nothing no value is better than the base's."""
    still = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-30, "weight_decay": 0.0, "torch_adam": True}},
             "seppo.output_dir": str(tmp_path / "run")}
    run = train(settings(**still, **keys(patience=2, keep_best=True)))
    said = capsys.readouterr().out
    assert "stopped early: the last 2 evaluations brought no better pickscore than" in said and "seppo.evaluation.patience" in said
    assert "best is not written: none is better than the model that training began with" in said and not (run / "best").exists()
    assert list(scored(run)) == [0, 1, 2] and (run / "final").is_dir() and checkpoints(run) == ["update_00000002"]
    train(settings(**still, **keys(patience=2)), resume="auto")  # nothing is left to do
    assert list(scored(run)) == [0, 1, 2]
    train(settings(**still, **keys(patience=3)), resume="auto")
    assert list(scored(run)) == [0, 1, 2, 3] and "stopped early" in capsys.readouterr().out
    train(settings(**still, **keys(patience=3, seed=1)), resume="auto")  # other noise: what was measured is no measure any more
    assert list(scored(run)) == [0, 1, 2, 3, 4] and "measures otherwise than before" in capsys.readouterr().out
    at_its_end = train(settings(**still | {"seppo.output_dir": str(tmp_path / "end")}, **keys(patience=4)))
    assert list(scored(at_its_end)) == [0, 1, 2, 3, 4] and "stopped early" not in capsys.readouterr().out


def test_the_best_stays(trained: Any, keys: Any, clip: Path, ranks: Any, tmp_path: Path) -> None:
    """By Vendi, a set's score, with PickScore beside it; of this model at such a rate the last policy is not the best."""
    known = keys()["seppo.evaluation"]["weights"] | {"vendi": str(clip)}
    base = tiny_sd(tmp_path / "base", block_out_channels=(8, 16), mid_block_type=None, up_block_types=("UpBlock2D",) * 2)
    run = trained(**keys(scores=["pickscore", "vendi"], weights=known, watch="vendi", keep_best=True, per_prompt=2),
                  **{"seppo.checkpoint.keep_last": 1, "optimizer.params.lr": 3e-3, "seppo.model.path": str(base)})
    values = scored(run, "vendi")
    best = max(values, key=values.get)
    assert 0 < best < 4 and checkpoints(run) == [f"update_{best:08d}", "update_00000004"]
    StableDiffusionPipeline.from_pretrained(run / "best")
    assert f"{best} optimizer updates" in (run / "best" / "README.md").read_text()
    again = values_by_command({"best": run / "best"}, clip, tmp_path / "out", ranks)
    assert again == pytest.approx([scored(run)[best]], rel=ROUNDING)
    assert_alike(run / "evaluation" / "samples" / f"update_{best:08d}", tmp_path / "out" / "samples" / "best", 6)


def test_stopped_in_an_evaluation(forks: Forks, settings: Any, keys: Any, tmp_path: Path) -> None:
    """The third, after the second update; resumed, the run has the same rows and weights as one that was never stopped."""

    def run(name: str, strike: Strike | None = None, *arguments: str) -> int:
        raw = settings(**{"seppo.output_dir": str(tmp_path / name), **keys(keep_best=True), "seppo.checkpoint.every": 1,
                          "seppo.iterations": 1, "seppo.updates_per_iteration": 3})
        return forks.run(raw, *arguments, strike=strike).status

    whole = tmp_path / "whole"
    assert run("whole") == 0
    for number, (function, signum) in enumerate(product((SAMPLING, SCORING), (signal.SIGKILL, signal.SIGTERM))):
        stopped = tmp_path / str(number)
        run(stopped.name, Strike(function, 3, signum))
        last = 1 if signum == signal.SIGKILL else 2  # a checkpoint is written after the evaluation, and where a signal stops it
        assert checkpoints(stopped)[-1] == f"update_{last:08d}" and not (stopped / "final").exists(), (function, signum)
        assert run(stopped.name, None, "--resume", "auto") == 0, (function, signum)
        assert scored(stopped) == scored(whole) and column(stopped, "update") == column(whole, "update"), (function, signum)
        assert identical(weights(stopped), weights(whole)), (function, signum)
        assert (stopped / "best").is_dir() == (whole / "best").is_dir()


@pytest.mark.parametrize(("changes", "words"), [
    ({"prompts": []}, "prompts is needed with every"),
    ({"every": 0, "patience": 2}, "patience needs every"),
    ({"every": 0, "keep_best": True}, "keep_best needs every"),
    ({"watch": "vendi"}, "watch='vendi' is none of the scores (pickscore)"),
    ({"patience": 0}, "seppo.evaluation.patience"),
    ({"score": ["pickscore"]}, "seppo.evaluation.score"),
    ({"scores": []}, "seppo.evaluation.scores"),
])
def test_a_section_that_makes_no_sense(settings: Any, keys: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(settings(**keys(**changes)))
    assert words in str(caught.value) and "seppo.evaluation" in str(caught.value)


@pytest.mark.parametrize(("changes", "words"), [
    ({"prompts": "nowhere.txt"}, "seppo.evaluation.prompts nowhere.txt: nowhere.txt does not exist"),
    ({"prompts": ["a cat", "  "]}, "seppo.evaluation.prompts has an empty prompt"),
    ({"scores": ["pikscore"]}, "seppo.evaluation.scores pikscore: there is no such score of images; there are pickscore"),
    ({"weights": {"pickscor": "x"}}, "seppo.evaluation.weights pickscor=x: no score has weights called 'pickscor'"),
    ({"real": "nowhere"}, "seppo.evaluation.real nowhere: no such folder"),
])
def test_what_cannot_be_evaluated_is_said_before_anything_loads(settings: Any, keys: Any, train: Any, changes: dict[str, Any],
                                                                words: str) -> None:
    raw = settings(**keys(**changes))
    for attempt in (lambda: dry_run(parse_config(raw), 1), lambda: train(raw)):
        with pytest.raises(UserError) as caught:
            attempt()
        assert words in str(caught.value)
    assert not Path(raw["seppo"]["output_dir"]).exists()


def test_missing_weights_are_named_before_training(settings: Any, keys: Any, train: Any) -> None:
    raw = settings(**keys(weights={"pickscore": "nowhere"}))
    with pytest.raises(UserError) as caught:
        train(raw)
    assert "nowhere is no folder" in str(caught.value) and "seppo.evaluation.weights" in str(caught.value)
    assert not Path(raw["seppo"]["output_dir"]).exists()


def test_the_plan_says_it(settings: Any, keys: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    said = dry_run(parse_config(settings(**keys(every=30, prompts=str(tmp_path / "prompts.txt"), patience=3, keep_best=True))), 1)
    line = next(line for line in said.splitlines() if line.strip().startswith("evaluation"))
    assert f"pickscore of {tmp_path / 'prompts.txt'} every 30 updates; ends after 3 without a better pickscore" in line
    assert json.dumps(keys()["seppo.evaluation"]["weights"]) not in said
