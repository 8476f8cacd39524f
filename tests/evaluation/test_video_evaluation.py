"""Evaluations of videos: what is said of clips, packages, models and settings that do not do."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_adapter

from seppo_fast.errors import UserError


@pytest.mark.slow
def test_a_score_that_refuses_the_clips_is_missing_with_its_reason(
        evaluated: Any, of_videos: Any, networks: dict[str, Path], tmp_path: Path) -> None:
    result = evaluated(of_videos(tmp_path, "--frames", 8, "--scores", "lpips", "psnr", "fvd",
                                 "--weights", *(f"{name}={networks[name]}" for name in ("lpips", "fvd"))))
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


@pytest.mark.slow
def test_without_a_package_the_scores_that_need_it_are_missing(
        evaluated: Any, of_videos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    result = evaluated(of_videos(tmp_path, "--frames", 2, "--scores", "psnr"))
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
        evaluated: Any, of_videos: Any, videos: Path, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    places = {"base": videos / "base", "csv": videos / "prompts.csv",
              "other": tiny_adapter(tmp_path / "other", block_out_channels=(16, 16)),
              "deep": tiny_adapter(tmp_path / "deep", motion_layers_per_block=2)}
    with pytest.raises(UserError, match=message) as raised:
        evaluated(of_videos(tmp_path / "out", "--frames", 8, *(each.format_map(places) for each in more)))
    assert "seppo." not in str(raised.value) and "\n" not in str(raised.value)
