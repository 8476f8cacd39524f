"""The whole of an evaluation: samples, scores and tables of tiny models, interrupted, damaged and added to."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_clip, tiny_sd

from seppo_fast.config import Sampler
from seppo_fast.errors import UserError
from seppo_fast.evaluation.generate import Drawing, latent_shape
from seppo_fast.evaluation.scores import pickscore, vendi
from seppo_fast.models import open_model
from seppo_fast.models.common import load_unet
from seppo_fast.models.families import open_directory


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models, a CLIP, prompts."""
    root = tmp_path_factory.mktemp("evaluation")
    base, tuned, prompts = root / "base", root / "tuned", root / "prompts.txt"
    for path in (base, tuned):
        tiny_sd(path)
    unet = load_unet(open_directory(tuned), torch.float32)
    with torch.no_grad():
        unet.conv_out.bias.add_(0.05)
    unet.save_pretrained(tuned / "unet")
    prompts.write_text("a cat\na dog\na cow\n")
    (root / "clip").mkdir()
    return {"base": base, "tuned": tuned, "prompts": prompts, "clip": tiny_clip(root / "clip")}


@pytest.fixture
def run(folders: dict[str, Path], evaluated: Any) -> Any:
    """`run(out, *more)`: the result for base and tuned."""

    def call(out: Path, *more: str, models: tuple[str, ...] = ("base", "tuned"), prompts: Path | None = None) -> dict[str, Any]:
        arguments = ["--models", *(f"{name}={folders[name]}" for name in models), "--prompts", str(prompts or folders["prompts"]),
                     "--out", str(out), "--steps", "2", "--scores", "pickscore", "imagereward", "vendi",
                     "--weights", f"pickscore={folders['clip']}", f"vendi={folders['clip']}",
                     f"imagereward={folders['prompts'].parent / 'nothing.pt'}", *more]
        return evaluated(arguments)

    return call


def values(result: dict[str, Any], score: str = "pickscore") -> dict[tuple[str, str, int], float]:
    texts = [prompt["text"] for prompt in result["prompts"]]
    return {(sample["model"], texts[sample["prompt"]], sample["sample"]): sample["values"].get(score)
            for sample in result["samples"]}


@pytest.mark.slow
def test_batches_order_and_an_interruption_change_nothing(run: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    whole = run(tmp_path / "a", "--per-prompt", "2", "--batch-size", "1", "--score-batch-size", "1")
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "a" / "samples" / "tuned").iterdir()}
    assert len(pictures) == 6 and len(set(pictures.values())) == 6
    other = tmp_path / "other.txt"
    other.write_text("a cow\na cat\n")
    run(tmp_path / "b", "--batch-size", "16", models=("base",), prompts=other)  # less, in another order
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "b" / "samples").rglob("*.png")}
    again = run(tmp_path / "b", "--per-prompt", "2", "--batch-size", "16")
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert values(again).keys() == values(whole).keys()
    for key, value in values(whole).items():
        assert values(again)[key] == pytest.approx(value, abs=2e-2), key  # a grey level may round otherwise


@pytest.mark.slow
def test_the_table_is_the_samples_mean_and_what_is_missing_is_said(run: Any, tmp_path: Path) -> None:
    result = run(tmp_path)
    missing = {score["name"]: score["missing"] for score in result["scores"]}
    assert missing["pickscore"] is None
    row = next(row for row in result["table"] if (row["model"], row["score"]) == ("tuned", "pickscore"))
    assert not [sample["problem"] for sample in result["samples"] if sample["problem"]]
    tuned = [value for key, value in values(result).items() if key[0] == "tuned"]
    base = [value for key, value in values(result).items() if key[0] == "base"]
    assert row["mean"] == pytest.approx(sum(tuned) / 3) and row["count"] == 3 and row["low"] <= row["mean"] <= row["high"]
    assert row["win_rate"]["mean"] == pytest.approx(sum(one > other for one, other in zip(tuned, base, strict=True)) / 3)
    assert "nothing.pt" in missing["imagereward"] and "--weights imagereward=" in missing["imagereward"]
    assert all(row["mean"] is None for row in result["table"] if row["score"] == "imagereward")
    diversity = [row["mean"] for row in result["table"] if row["score"] == "vendi"]
    assert len(diversity) == 2 and all(1 <= value <= 3 for value in diversity)
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    assert "| missing |" in (tmp_path / "table.md").read_text() and "nothing.pt" in (tmp_path / "table.md").read_text()
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/webp") >= 6 and "nothing.pt" in page
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 7


@pytest.mark.slow
def test_a_damaged_sample_is_named_and_the_rest_is_kept(run: Any, tmp_path: Path) -> None:
    run(tmp_path, models=("base",))
    damaged = sorted((tmp_path / "samples" / "base").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:60])
    result = run(tmp_path, models=("base",))
    problems = [sample["problem"] for sample in result["samples"] if sample["problem"]]
    assert len(problems) == 1 and damaged.name in problems[0]
    assert sum(value is not None for value in values(result).values()) == 2
    assert next(row["count"] for row in result["table"] if row["score"] == "pickscore") == 2


@pytest.mark.slow
def test_a_sample_that_a_scorer_makes_nothing_of_is_named_and_the_rest_is_kept(
        run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path)
    cosines, features = pickscore.cosines, vendi.image_features
    monkeypatch.setattr(pickscore, "cosines", lambda model, tokenizer, pixels, texts: torch.tensor(
        [math.nan if text == "a dog" else float(value)
         for text, value in zip(texts, cosines(model, tokenizer, pixels, texts), strict=True)]))
    monkeypatch.setattr(vendi, "image_features", lambda model, pixels: torch.cat(
        [features(model, pixels)[:-1], torch.full((1, 24), math.inf)]))  # of tuned's last sample, as all are one batch
    result = run(tmp_path)
    assert [(sample["model"], sample["prompt"], sample["problem"]) for sample in result["samples"] if sample["problem"]] == [
        ("base", 1, "PickScore is nan"), ("tuned", 1, "PickScore is nan"),
        ("tuned", 2, "Vendi: its features are not finite")]
    expected = {key: None if key[1] == "a dog" else value for key, value in values(whole).items()}
    assert values(result) == {key: value and pytest.approx(value) for key, value in expected.items()}
    rows = {(row["model"], row["score"]): row for row in result["table"]}
    assert rows["tuned", "pickscore"]["count"] == rows["tuned", "pickscore"]["win_rate"]["count"] == 2
    assert (rows["base", "vendi"]["count"], rows["tuned", "vendi"]["count"]) == (3, 2) and rows["tuned", "vendi"]["mean"] <= 2
    with (tmp_path / "scores.csv").open(newline="") as file:
        dog = [row for row in csv.DictReader(file) if row["prompt"] == "a dog"]
    assert [(row["pickscore"], row["problem"]) for row in dog] == 2 * [("", "PickScore is nan")]
    assert "NaN" not in (tmp_path / "scores.json").read_text()
    assert '"problem":"PickScore is nan"' in (tmp_path / "index.html").read_text()


@pytest.mark.slow
def test_a_folder_of_other_samples_is_refused(run: Any, folders: dict[str, Path], evaluated: Any, tmp_path: Path) -> None:
    run(tmp_path, models=("base",))
    with pytest.raises(UserError, match="holds samples with seed 0, and now it is 1"):
        run(tmp_path, "--seed", "1")
    with pytest.raises(UserError, match="holds samples with vae_tiling False, and now it is True"):
        run(tmp_path, "--vae-tiling")
    noted = json.loads((tmp_path / "evaluation.json").read_text())
    del noted["drawing"]["vae_tiling"]  # as an earlier version left it
    (tmp_path / "evaluation.json").write_text(json.dumps(noted))
    run(tmp_path, "--vae-slicing", models=("base",))
    with pytest.raises(UserError, match="holds samples with vae_tiling False, and now it is True"):
        run(tmp_path, "--vae-tiling")
    arguments = ["--models", f"base={folders['tuned']}", "--prompts", str(folders["prompts"]), "--out", str(tmp_path),
                 "--steps", "2"]
    with pytest.raises(UserError, match="samples of another model called 'base'"):
        evaluated(arguments)


@pytest.mark.parametrize(("more", "message"), [
    (("--scores", "pikscore"), "pikscore: there is no such score of images; there are pickscore"),
    (("--weights", "pickscore"), "SCORE=PATH is needed"),
    (("--weights", "pickscor=x"), "no score has weights called 'pickscor'"),
    (("--real", "nowhere"), "nowhere: no such folder"),
    (("--resolution", "17"), "no multiple of"),
])
def test_bad_arguments_are_named(run: Any, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", *more)


@pytest.mark.parametrize(("size", "side"), [(8, 8), ([8, 8], 8), ([8, 16], None), (None, None)])
def test_the_size_of_samples_is_the_networks_own_or_has_to_be_given(tmp_path: Path, size: Any, side: int | None) -> None:
    file = tiny_sd(tmp_path / "sd") / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": size}))
    model = open_model(str(tmp_path / "sd"))
    drawing = Drawing(0, 1, None, None, torch.float32, Sampler())
    assert latent_shape(model, replace(drawing, resolution=32))[-1] == 32 // model.vae_scale_factor
    if side is None:
        with pytest.raises(UserError, match=r"unet/config.json: sample_size is .*; give --resolution"):
            latent_shape(model, drawing)
    else:
        assert latent_shape(model, drawing)[-2:] == (side, side)


def test_a_size_that_is_text_is_damage(tmp_path: Path) -> None:
    file = tiny_sd(tmp_path / "sd") / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": "8"}))
    with pytest.raises(UserError, match="unet/config.json: sample_size is '8', where a whole number or a list"):
        open_model(str(tmp_path / "sd"))
