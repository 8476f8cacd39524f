"""The video quickstart's result: a table, the samples side by side as a loop and as stills, and result.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import matplotlib
import torch
import torchmetrics
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from seppo_fast.quickstart.digits import WORDS
from seppo_fast.quickstart.report import RATES, about_run, iterations
from seppo_fast.quickstart.video.clips import DIRECTIONS
from seppo_fast.quickstart.video.demonstrations import RATE
from seppo_fast.quickstart.video.judge import FEATURES, STILL, Judge, Scores

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402  (after the backend: there may be no display)

TITLES = ("base", "after SePPO, same noise")
# name, label, how it is written, how much one unit is in print
MEASURES = (
    ("direction_accuracy", "direction accuracy", "{:.1f}%", "{:+.1f}", 100), ("moving", "moving", "{:.1f}%", "{:+.1f}", 100),
    ("frechet_distance", "Frechet distance", "{:.2f}", "{:+.2f}", 1), ("ssim", "SSIM", "{:.3f}", "{:+.3f}", 1),
    ("psnr", "PSNR", "{:.2f} dB", "{:+.2f}", 1),
)


def table(base: Scores, trained: Scores, judge: Judge, rows: Sequence[Mapping[str, Any]]) -> str:
    """Scores before and after and of clean clips, and the training's own figures, as text."""
    lines = ["", f"{'':<22}{'base':>10}{'SePPO':>11}{'change':>10}{'clean clips':>14}"]
    for name, label, form, change, unit in MEASURES:
        before, after, real = (unit * getattr(scores, name) for scores in (base, trained, judge.real))
        lines.append(f"{label:<22}{form.format(before):>10}{form.format(after):>11}{change.format(after - before):>10}"
                     f"{form.format(real):>14}")
    lines += [
        *iterations(rows, 10, 11),
        "",
        f"direction accuracy: share of {base.samples} samples whose digit travels in the prompt's direction, by least squares",
        f"  on the frames' centroids (right for {100 * judge.accuracy:.1f}% of the held-out clips); a digit that travels less than",
        f"  {STILL:.0f} pixels does not move. Frechet distance (less is better): to clips of held-out digits, on {FEATURES} random",
        "  projections of 8x8 frames and of their differences. SSIM and PSNR: to the held-out clip of the same prompt whose",
        "  squared error is least. Clean clips: the same measures of as many real clips of the models' own digits.",
        RATES,
    ]
    return "\n".join(lines)


def loop(path: Path, base: Tensor, trained: Tensor, labels: Sequence[int], scale: int = 2) -> None:
    """Both models' samples `(N, F, 1, 32, 32)` as an animated WebP that loops: a row a direction, a column a digit."""
    grids = [_grid(clips, labels) for clips in (base, trained)]  # (F, H, W)
    frames, height, width = (grids[0].shape[0], grids[0].shape[1] * scale, grids[0].shape[2] * scale)
    left, top, gap = 48, 24, 16
    font = ImageFont.load_default(size=14)
    page = Image.new("RGB", (left + 2 * width + gap, top + height), "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(TITLES):
        draw.text((left + column * (width + gap), 4), title, fill="black", font=font)
    for row, direction in enumerate(DIRECTIONS):
        draw.text((4, top + (row + 0.5) * height / len(DIRECTIONS) - 8), direction, fill="black", font=font)
    pages = []
    for frame in range(frames):
        pages.append(page.copy())
        for column, grid in enumerate(grids):
            picture = Image.fromarray((grid[frame].clamp(0, 1) * 255).round().byte().numpy())
            pages[-1].paste(picture.resize((width, height), Image.Resampling.NEAREST), (left + column * (width + gap), top))
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=1000 // RATE, loop=0, quality=50, method=4)


def stills(path: Path, base: Tensor, trained: Tensor, labels: Sequence[int], per_direction: int = 2, every: int = 3) -> None:
    """The same samples as one picture: a row a clip, its frames from left to right."""
    chosen = [index for direction in range(len(DIRECTIONS))
              for index in [row for row, label in enumerate(labels) if label % len(DIRECTIONS) == direction][:per_direction]]
    names = [f"{WORDS[labels[index] // len(DIRECTIONS)]}, {DIRECTIONS[labels[index] % len(DIRECTIONS)]}" for index in chosen]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 7.3), layout="constrained")
    for axis, clips, title in zip(axes, (base, trained), TITLES, strict=True):
        rows = [torch.cat(list(clips[index, ::every, 0]), dim=1) for index in chosen]
        axis.imshow(torch.cat(rows, dim=0).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        size = clips.shape[-1]
        for row in range(1, len(rows)):
            axis.axhline(size * row - 0.5, color="0.5", linewidth=0.8)
        axis.set_title(title)
        axis.set_xticks([size * (column + 0.5) for column in range(len(range(0, clips.shape[1], every)))],
                        [str(frame + 1) for frame in range(0, clips.shape[1], every)])
        axis.set_xlabel("frame")
        axis.set_yticks([size * (row + 0.5) for row in range(len(rows))], names if axis is axes[0] else [])
        axis.tick_params(length=0)
    figure.suptitle('prompts: "a seven moving left"')
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write_result(
    path: Path, base: Scores, trained: Scores, judge: Judge, rows: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float], settings: Mapping[str, Any],
) -> None:
    """Writes all measured values, and machine and settings, as JSON."""
    result = about_run(rows, seconds, settings, torchmetrics, av) | {
        "judge": {"accuracy_on_held_out_clips": judge.accuracy, "clean_clips": asdict(judge.real), "still": STILL,
                  "features": FEATURES},
        "base": asdict(base),
        "seppo": asdict(trained),
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


def _grid(clips: Tensor, labels: Sequence[int]) -> Tensor:
    """The first sample of each caption, directions down and digits across, with thin lines between: `(F, H, W)`."""
    first = {label: index for index, label in reversed(list(enumerate(labels)))}
    framed = torch.nn.functional.pad(clips[:, :, 0], (0, 1, 0, 1), value=0.5)
    blank = torch.zeros_like(framed[0])
    cells = [[framed[first[label]] if label in first else blank for label in range(direction, len(WORDS) * len(DIRECTIONS),
              len(DIRECTIONS))] for direction in range(len(DIRECTIONS))]
    return torch.cat([torch.cat(row, dim=2) for row in cells], dim=1)
