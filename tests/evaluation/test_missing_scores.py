"""Scores that lack their weights: told before anything is drawn, and the rest goes on; what a later run keeps of an earlier one."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import huggingface_hub.constants as hub
import pytest
from tiny import tiny_clip, tiny_sd

from seppo_fast.errors import UserError
from seppo_fast.evaluate import parse_arguments, run
from seppo_fast.evaluation.arguments import request_of
from seppo_fast.evaluation.run import evaluate


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a CLIP, prompts."""
    root = tmp_path_factory.mktemp("missing")
    for seed, name in enumerate(("base", "tuned")):
        tiny_sd(root / name, seed=seed)
    (root / "clip").mkdir()
    tiny_clip(root / "clip")
    (root / "prompts.txt").write_text("a cat\na dog\n")
    return root


@pytest.fixture
def arguments(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`arguments(out, *more)`: the command line for the first model; no hub is asked."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    return lambda out, *more: parse_arguments(["--models", f"base={folders / 'base'}", "--prompts", str(folders / "prompts.txt"),
                                               "--out", str(out), "--steps", "1", *more])


def test_what_is_missing_is_told_before_anything_is_drawn(arguments: Any, ranks: Any, folders: Path, tmp_path: Path) -> None:
    given, told = arguments(tmp_path / "out", "--scores", "vendi", "imagereward", "--weights", f"vendi={folders / 'clip'}"), {}

    def say(line: str) -> None:
        told[line] = (tmp_path / "out" / "samples").exists()

    result = evaluate(request_of(given, ranks, say), ranks, say)
    (why,) = (line for line in told if line.startswith("missing: ImageReward (imagereward) lacks its model"))
    assert told[why] is False
    assert not any("no score can be given" in line for line in told)
    assert {score["name"]: bool(score["missing"]) for score in result["scores"]} == {"imagereward": True, "vendi": False}
    assert len(list((tmp_path / "out" / "samples").rglob("*.png"))) == 2


def test_all_missing_is_an_error_after_the_pictures_were_made(arguments: Any, ranks: Any, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture) -> None:
    with (patch("seppo_fast.ranks.join", lambda *_: ranks),
          pytest.raises(UserError, match=r"every score that was asked for is missing.*the same command scores them")):
        run(arguments(tmp_path, "--scores", "pickscore", "vendi"))
    printed = capsys.readouterr().out
    assert "no score can be given; samples and page are made all the same" in printed and "| base | missing | missing |" in printed
    assert len(list((tmp_path / "samples").rglob("*.png"))) == 2
    assert (tmp_path / "index.html").read_text().count("data:image/webp") == 2


@pytest.mark.slow
def test_a_later_run_keeps_the_times_of_the_first(arguments: Any, ranks: Any, folders: Path, tmp_path: Path) -> None:
    def seconds(*more: str) -> dict[str, float]:
        given = arguments(tmp_path, "--scores", "vendi", "--weights", f"vendi={folders / 'clip'}", *more)
        return evaluate(request_of(given, ranks, print), ranks, lambda line: None)["about"]["seconds"]

    first = seconds()
    noted = json.loads((tmp_path / "evaluation.json").read_text())
    assert first["samples of base"] == round(noted["seconds"]["base"], 1) > 0
    noted["seconds"]["base"] = 1000.0
    (tmp_path / "evaluation.json").write_text(json.dumps(noted))
    both = seconds("--models", f"base={folders / 'base'}", f"tuned={folders / 'tuned'}")
    assert both["samples of base"] == 1000 and both.keys() == {"samples of base", "samples of tuned", "scores"}
    next((tmp_path / "samples" / "base").iterdir()).unlink()
    assert seconds()["samples of base"] > 1000  # and what is drawn again is added


@pytest.mark.parametrize("noted", ['[]', '{"base": "long"}'])
def test_times_that_are_none_are_damage(arguments: Any, ranks: Any, tmp_path: Path, noted: str) -> None:
    (tmp_path / "evaluation.json").write_text(f'{{"drawing": null, "models": {{}}, "seconds": {noted}}}')
    with pytest.raises(UserError, match=r"evaluation.json is damaged"):
        evaluate(request_of(arguments(tmp_path), ranks, print), ranks, lambda line: None)


@pytest.mark.slow
def test_weights_and_models_of_ones_own_are_named(arguments: Any, ranks: Any, folders: Path, tmp_path: Path) -> None:
    given = arguments(tmp_path, "--scores", "vendi", "--weights", f"vendi={folders / 'clip'}")
    result = evaluate(request_of(given, ranks, print), ranks, lambda line: None)
    assert [model["local"] for model in result["models"]] == [True]
    (score,) = result["scores"]
    assert score["weights"] == {"model": str(folders / "clip")}
    assert score["published"] == {"model": "openai/clip-vit-large-patch14"}
    line = f"- Vendi, model: {folders / 'clip'} (published: openai/clip-vit-large-patch14)"
    assert f"Weights given by path, not compared with the published ones:\n{line}\n" in (tmp_path / "table.md").read_text()
