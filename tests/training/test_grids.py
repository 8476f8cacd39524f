"""Sample grids as pictures, and where monitors write."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.training.engine import engine_config
from seppo_fast.training.samples import CAPTION, FONT, Layout, save_sheet, shortened


@pytest.mark.parametrize(("side", "scale"), [(8, 16), (16, 8), (64, 2), (65, 1), (128, 1), (512, 1), (200, 1)])
def test_small_samples_are_enlarged_by_a_whole_number(side: int, scale: int, tmp_path: Path) -> None:
    samples = torch.rand(4, 3, side, side)
    sheet = np.asarray(Image.open(save_sheet(samples, ["a cat", "a dog"], 2, 8, tmp_path / "grid")))
    layout = Layout(side, side, 2)
    assert layout.scale == scale and sheet.shape[:2] == layout.size(4)[::-1]
    for index, sample in enumerate(samples):
        left, top = layout.place(index)
        tile = sheet[top : top + side * scale, left : left + side * scale]
        assert (tile == np.kron((sample * 255).round().byte().permute(1, 2, 0).numpy(), np.ones((scale, scale, 1), np.uint8))).all()
    for row in (0, 1):
        top = layout.place(2 * row)[1]
        assert (sheet[top - CAPTION : top] < 128).any(), "its prompt stands above it"


def test_clips_move_below_their_prompts(tmp_path: Path) -> None:
    file = save_sheet(torch.rand(2, 3, 3, 16, 24), ["a", "b"], 1, 16, tmp_path / "grid")
    with Image.open(file) as sheet:
        assert file.suffix == ".webp" and sheet.n_frames == 3 and sheet.size == Layout(16, 24, 1).size(2) == (120, 2 * 97 - 1)


@pytest.mark.parametrize("text", ["a cat", "a very long prompt, " * 100, "two\n lines", "\u732b \u00e9 \u0434", "", "x" * 10**5])
def test_prompts_are_as_long_as_fits(text: str) -> None:
    font = ImageFont.load_default(FONT)
    short = shortened(text, 120, font)
    assert font.getlength(short) <= 120 and "\n" not in short
    assert short == " ".join(text.split()) or short.endswith("...") and text.startswith(short[:-3].split()[0])


def monitors(settings: Any, folder: Path, **sections: Any) -> dict[str, Any]:
    config = parse_config(settings(**{"seppo.output_dir": str(folder), **sections}))
    return engine_config(config, batch_plan(config.deepspeed, 1))


def test_monitors_write_below_the_run(settings: Any, tmp_path: Path) -> None:
    run, on = tmp_path / "run", {"enabled": True}
    filled = monitors(settings, run, csv_monitor=on, tensorboard=on | {"job_name": "mine"})
    assert filled["csv_monitor"] == on | {"output_path": str(run), "job_name": "csv_monitor"}
    assert filled["tensorboard"] == on | {"output_path": str(run), "job_name": "mine"}
    elsewhere = monitors(settings, run, csv_monitor=on | {"output_path": "there"}, tensorboard=on | {"output_path": ""})
    assert elsewhere["csv_monitor"] == on | {"output_path": "there", "job_name": "run"}, "a folder a run"
    assert elsewhere["tensorboard"] == on | {"output_path": str(run), "job_name": "tensorboard"}
    assert "csv_monitor" not in monitors(settings, run)


def test_a_run_with_monitors_leaves_nothing_elsewhere(train: Any, settings: Any, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard has the grids, too."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = train(settings(csv_monitor={"enabled": True}, tensorboard={"enabled": True},
                         **{"seppo.samples": {"every": 2, "prompts": ["a red cat"]}, "seppo.iterations": 1}))
    assert os.listdir(tmp_path / "here") == [] and (run / "csv_monitor" / "seppo_loss.csv").exists()
    events = accumulator.EventAccumulator(str(run / "tensorboard"), {"images": 0})
    events.Reload()
    shown = events.Images("seppo/samples")
    assert [image.step for image in shown] == [0, 2]
    grid = Image.open(run / "samples" / "update_00000002.png")
    assert (shown[1].width, shown[1].height) == grid.size and "seppo/loss" in events.Tags()["scalars"]
