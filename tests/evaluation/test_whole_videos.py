"""The whole of an evaluation of videos with all scores, gone on with, and the same on two ranks as on one."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from forked import Forks
from tiny import NARROW, tiny_clip, tiny_pix2pix

from seppo_fast import evaluate
from seppo_fast.evaluation.files import read_video
from seppo_fast.evaluation.video.real import read_clip
from seppo_fast.evaluation.video.scores import FVD

SHAPE = ("--frames", 9, "--resolution", 32, "--batch-size", 1)


def command(arguments: list[str], ranks: Any) -> None:
    """All of the command but its ends: this process has joined."""
    with patch("seppo_fast.ranks.join", lambda *_: ranks):
        evaluate.run(evaluate.parse_arguments(arguments))


@pytest.fixture(scope="module")
def weights(networks: dict[str, Path]) -> list[str]:
    return ["--weights", *(f"{name}={file}" for name, file in networks.items())]


@pytest.fixture(scope="module")
def whole(ranks: Any, of_videos: Any, weights: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the result of one model by all scores."""
    out = tmp_path_factory.mktemp("whole")
    command(of_videos(out, *SHAPE, *weights), ranks)
    return out, read(out)


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "scores.json").read_text())


def rows(result: dict[str, Any], model: str) -> dict[str, dict[str, Any]]:
    return {row["score"]: row for row in result["table"] if row["model"] == model}


def few(one: torch.Tensor, other: torch.Tensor) -> float:
    """The Frechet distance of features (M, D) with M < D: see test_the_distance_of_few_features_is_exact."""
    one, other = one.double(), other.double()
    centred = [(each - each.mean(0)) / (len(each) - 1) ** 0.5 for each in (one, other)]
    traces = sum(float(each.square().sum()) for each in centred)
    cross = float(torch.linalg.svdvals(centred[0] @ centred[1].T).sum())
    return float((one.mean(0) - other.mean(0)).square().sum()) + traces - 2 * cross


@pytest.mark.slow
def test_all_scores_and_on_with_another_model(ranks: Any, of_videos: Any, videos: Path, networks: dict[str, Path],
                                              weights: list[str], whole: Any, capsys: pytest.CaptureFixture) -> None:
    out, result = whole
    assert [score["missing"] for score in result["scores"]] == [None] * 5
    a, b, c, d = result["samples"]
    assert "real clip 'c'" in c["problem"] and "d.webm" in d["problem"] and c["values"] == d["values"] == {}
    assert a["problem"] is b["problem"] is None and all(list(each["values"]) == ["lpips", "ssim", "psnr"] for each in (a, b))
    drawn = [read_video(out / each["file"], 9) for each in (a, b)]
    real = [read_clip(videos / "real" / name, 9, 32) for name in ("a.webm", "b.webm")]
    for sample, one, other in zip((a, b), drawn, real, strict=True):
        decibels = -10 * (one - other).square().mean((1, 2, 3)).log10().mean()
        assert sample["values"]["psnr"] == pytest.approx(float(decibels), rel=1e-4)
        assert 0 < sample["values"]["lpips"] and -1 < sample["values"]["ssim"] < 1
    table = rows(result, "base")
    assert {name: row["count"] for name, row in table.items()} == {"fid": 18, "lpips": 2, "ssim": 2, "psnr": 2, "fvd": 2}
    features = FVD.load({"model": networks["fvd"]}, torch.device("cpu"))
    assert table["fvd"]["mean"] == pytest.approx(few(features(torch.stack(drawn)), features(torch.stack(real))), rel=1e-5)
    assert table["fid"]["mean"] > 0

    kept = {path: path.stat().st_mtime_ns for path in (out / "samples").rglob("*.webp")}
    lost = out / b["file"]
    content = lost.read_bytes()
    lost.unlink()
    command(of_videos(out, *SHAPE, "--scores", "psnr", "lpips", *weights, "--models", f"base={videos / 'base'}",
                      f"tuned={videos / 'tuned'}"), ranks)
    again = read(out)
    assert lost.read_bytes() == content and all(path.stat().st_mtime_ns == time for path, time in kept.items() if path != lost)
    assert [sample["values"] for sample in again["samples"][:4]] == [
        {name: sample["values"][name] for name in ("lpips", "psnr") if name in sample["values"]} for sample in result["samples"]]
    assert rows(again, "tuned")["psnr"]["win_rate"]["count"] == 2
    assert str(out / "index.html") in capsys.readouterr().out and (out / "index.html").read_text().count("data:image/webp") == 8


def test_two_ranks_give_what_one_gives(forks: Forks, ranks: Any, of_videos: Any, videos: Path, weights: list[str], whole: Any,
                                       tmp_path: Path) -> None:
    (tmp_path / "three.txt").write_text("a cat\na dog\na cow\n")
    (tmp_path / "refused.csv").write_text("videoid,name\nc,the photo\na,a red cat\n")
    clip, better = tiny_clip(tmp_path / "clip"), tiny_pix2pix(tmp_path / "better", **NARROW)

    def of_images(out: Path, *more: object) -> list[str]:
        scores = ("pickscore", "vendi", "vendi_prompt")
        return ["--models", *(f"{name}={videos / name}" for name in ("base", "tuned")), "--prompts", str(tmp_path / "three.txt"),
                "--out", str(out), "--steps", "1", "--batch-size", "1", "--score-batch-size", "1", "--scores", *scores,
                "--seed", "3",  # with 0 a pixel lies on the edge of two grey levels, and rounding decides
                "--weights", *(f"{name}={clip}" for name in scores), *map(str, more)]

    asked = {
        "videos": lambda out: of_videos(out, *SHAPE, *weights, "--scores", "lpips", "ssim", "psnr", "fvd"),  # FID takes long
        "images": lambda out: of_images(out, "--per-prompt", 2),
        "improved": lambda out: of_images(out, "--models", f"base={videos / 'base'}", f"improved={better}@base"),
        "no image for a rank": lambda out: of_images(out, "--models", f"base={videos / 'base'}", "--limit", 1),
        "no clip for a rank": lambda out: of_videos(out, *SHAPE, *weights, "--limit", 1, "--scores", "psnr", "fvd"),
        "refused on one rank": lambda out: of_videos(out, "--frames", 2, "--prompts", tmp_path / "refused.csv", *weights,
                                                     "--scores", "lpips", "psnr"),
    }
    done = forks.run([arguments(tmp_path / f"two, {name}") for name, arguments in asked.items()], ranks=2, timeout=280,
                     module="evaluation.on_ranks")
    assert done.statuses == [0, 0], done.output[-6000:]
    for name, arguments in asked.items():
        if name != "videos":
            command(arguments(tmp_path / f"one, {name}"), ranks)
        one, two = whole[1] if name == "videos" else read(tmp_path / f"one, {name}"), read(tmp_path / f"two, {name}")
        scores, table = ([each for each in one[part] if "fid" not in each.values()] for part in ("scores", "table"))
        assert two["scores"] == scores and two["samples"] == one["samples"], name
        assert [row | {"mean": None} for row in two["table"]] == [row | {"mean": None} for row in table], name
        for row, other in zip(two["table"], table, strict=True):  # sums in another order
            assert row["mean"] == (other["mean"] and pytest.approx(other["mean"], rel=1e-6)), (name, row)
    refused = read(tmp_path / "two, refused on one rank")
    assert refused["scores"][0]["missing"] == "LPIPS needs frames of at least 31x31 pixels, and these are 16x16"
    assert refused["samples"][1]["values"].keys() == {"psnr"}
    assert done.output.count("index.html") == len(asked)  # the first rank alone reports
