"""The whole of an evaluation of videos: clips of a tiny AnimateDiff beside real ones, of which some cannot be used."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
from data.video_files import pictures, write_video
from evaluation.video_networks import alexnet_shapes, i3d_shapes, inception_shapes, random_weights, write
from tiny import tiny_adapter, tiny_sd

from seppo_fast.errors import UserError
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
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)

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


@pytest.mark.parametrize(("more", "message"), [
    (("--frames", "11"), "base=.*: --frames: 11 are more than the 10 positions .*set it to 10 or fewer"),
    (("--motion-adapter", "nowhere"), "base=.*: --motion-adapter 'nowhere' does not exist: give a MotionAdapter directory"),
    (("--motion-adapter", "{base}"), "--motion-adapter: .* is a whole pipeline; give an AnimateDiff pipeline as the model"),
    (("--motion-adapter", "{base}/unet"), "--motion-adapter: .*is of a 'UNet2DConditionModel', where a 'MotionAdapter'"),
    (("--motion-adapter", "{other}"), r"block_out_channels is \[16, 16\]"),
    (("--motion-adapter", "{deep}"), "--motion-adapter: it does not fit .*unet: Incompatible Motion Adapter"),
    (("--variant", "fp8"), "base=.*: --variant 'fp8': .*unet has no such weights"),
    (("--models", "x=/nowhere"), "--models x=/nowhere: the model '/nowhere' does not exist: give a diffusers pipeline directory"),
    (("--models", "x={csv}"), "--models x=.*prompts.csv: the model '.*prompts.csv' is a file"),
    (("--models", "x=tiny/none"), "--models x=tiny/none: the model 'tiny/none' is no local directory, and could not be fetched"),
    (("--steps", "1001"), "--steps: 1001 is not between 1 and the model's 1000 training timesteps"),
])
def test_bad_models_and_settings_are_named_by_their_flags(
        run: Any, folder: Path, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    places = {"base": folder / "base", "csv": folder / "prompts.csv",
              "other": tiny_adapter(tmp_path / "other", block_out_channels=(16, 16)),
              "deep": tiny_adapter(tmp_path / "deep", motion_layers_per_block=2)}
    with pytest.raises(UserError, match=message) as raised:
        run(tmp_path / "out", "--frames", "8", *(each.format_map(places) for each in more))
    assert "seppo." not in str(raised.value) and "\n" not in str(raised.value)
