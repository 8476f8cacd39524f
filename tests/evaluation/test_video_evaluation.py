"""The whole of an evaluation of videos: clips of a tiny AnimateDiff beside real ones, of which some cannot be used."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.video_files import pictures, write_video
from evaluation.video_networks import alexnet_shapes, i3d_shapes, inception_shapes, random_weights, write
from tiny import tiny_adapter, tiny_sd

from seppo_fast.evaluate import parse_arguments
from seppo_fast.evaluation.arguments import wanted_of
from seppo_fast.evaluation.run import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion, a motion adapter for 10 frames, real clips a and b, and d, which is cut."""
    root = tmp_path_factory.mktemp("videos")
    tiny_sd(root / "base")
    tiny_adapter(root / "adapter", motion_max_seq_length=10)
    for seed, name in enumerate(("a.webm", "b.webm", "d.webm")):
        write_video(root / "real" / name, pictures(12, height=40, width=48, seed=seed))
    cut = root / "real" / "d.webm"
    cut.write_bytes(cut.read_bytes()[:-200])
    (root / "prompts.csv").write_text("videoid,name\na,a red cat\nb,a blue sky\nc,the photo\nd,a dog\n")
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The networks' published files, with random weights."""
    root = tmp_path_factory.mktemp("weights")
    shapes = {"lpips": alexnet_shapes(), "fid": inception_shapes(), "fvd": i3d_shapes()}
    return {name: write(random_weights(each), root / name) for name, each in shapes.items()}


@pytest.fixture
def run(folder: Path, ranks: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`run(out, *more)`: the result for one model; no hub is asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(out: Path, *more: str) -> dict[str, Any]:
        arguments = ["--models", f"base={folder / 'base'}", "--motion-adapter", str(folder / "adapter"), "--prompts",
                     str(folder / "prompts.csv"), "--real", str(folder / "real"), "--out", str(out), "--steps", "1", *more]
        return evaluate(wanted_of(parse_arguments(arguments), ranks, print), ranks, lambda line: None)

    return call


def test_a_score_that_refuses_the_clips_is_missing_with_its_reason(run: Any, files: dict[str, Path], tmp_path: Path) -> None:
    result = run(tmp_path, "--frames", "8", "--scores", "lpips", "psnr", "fvd",
                 "--weights", *(f"{name}={files[name]}" for name in ("lpips", "fvd")))
    missing = {score["name"]: score["missing"] for score in result["scores"]}
    assert missing == {"lpips": "LPIPS needs frames of at least 31x31 pixels, and these are 16x16", "psnr": None,
                       "fvd": "FVD needs clips of 9 or more frames, and these have 8"}
    assert [list(sample["values"]) for sample in result["samples"]] == [["psnr"], ["psnr"], [], []]
    means = {row["score"]: row["mean"] for row in result["table"]}
    assert means["psnr"] > 0 and means["lpips"] is None and "fvd" not in means
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    for name in ("table.md", "index.html"):
        text = (tmp_path / name).read_text()
        assert all(reason in text for reason in missing.values() if reason), name


def test_without_a_package_the_scores_that_need_it_are_missing(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    result = run(tmp_path, "--frames", "2", "--scores", "psnr")
    assert "needs the package av" in result["scores"][0]["missing"]
    assert [(sample["values"], sample["problem"]) for sample in result["samples"]] == 4 * [({}, None)]
