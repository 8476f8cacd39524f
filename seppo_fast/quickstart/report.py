"""The quickstart's result: a table, the samples side by side, the curves and result.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed
import diffusers
import matplotlib
import torch
import transformers
from torch import Tensor

from seppo_fast.machine import commit, machine
from seppo_fast.quickstart.digits import WORDS
from seppo_fast.quickstart.judge import Judge, Scores

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402  (after the backend: there may be no display)

RATES = "AAF rate: share of pairs with sign -1 (App. B.2); implicit accuracy: share with logit > 0."
FIGURES = ("loss", "aaf_rate", "implicit_acc", "abs_logit_p50", "beta")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The updates' rows of a run's metrics.jsonl."""
    return [row for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]


def iteration_mean(rows: Sequence[Mapping[str, Any]], key: str, which: int) -> float:
    """Mean of `key` over the first (`which=0`) or the last (`which=-1`) iteration's updates; NaN where none has it."""
    iteration = sorted({row["iteration"] for row in rows})[which]
    # Numbers that were not finite are null in the file.
    values = [row[key] for row in rows if row["iteration"] == iteration and row[key] is not None]
    return sum(values) / len(values) if values else float("nan")


def table(base: Scores, trained: Scores, judge: Judge, rows: Sequence[Mapping[str, Any]]) -> str:
    """Scores before and after, and the training's own figures, as text."""
    lines = ["", f"{'':<22}{'base':>8}{'SePPO':>9}{'change':>10}"]
    for name in ("prompt_accuracy", "cleanliness"):
        before, after = 100 * getattr(base, name), 100 * getattr(trained, name)
        lines.append(f"{name.replace('_', ' '):<22}{before:>7.1f}%{after:>8.1f}%{after - before:>+10.1f}")
    lines += [
        *iterations(rows, 8, 9),
        "",
        f"prompt accuracy: share of {base.samples} samples that a classifier reads as the prompt's digit (it learnt",
        f"  from digits that neither model saw, and reads {100 * judge.accuracy:.1f}% of the models' digits rightly).",
        "cleanliness: share of samples as close to a held-out digit as 95% of the real digits are.",
        RATES,
    ]
    return "\n".join(lines)


def iterations(rows: Sequence[Mapping[str, Any]], *widths: int) -> list[str]:
    """The training's figures in its first and its last iteration, in two columns of these widths."""
    ends = [f"k={rows[which]['iteration']:.0f}" for which in (0, -1)]
    lines = ["", f"{'':<22}" + "".join(f"{end:>{width}}" for end, width in zip(ends, widths, strict=True))
             + "    (means over an iteration)"]
    for key, name in (("aaf_rate", "AAF rate"), ("implicit_acc", "implicit accuracy")):
        means = (iteration_mean(rows, key, which) for which in (0, -1))
        lines.append(f"{name:<22}" + "".join(f"{mean:>{width}.2f}" for mean, width in zip(means, widths, strict=True)))
    return lines


def side_by_side(path: Path, base: Tensor, trained: Tensor, labels: Sequence[int], per_prompt: int = 8,
                 method: str = "SePPO") -> None:
    """Save a picture with a row per prompt: samples `(N, 3, H, W)` of the base and, from the same noise, of the trained model."""
    grids(path, {"base": base, f"after {method}, same noise": trained}, labels, per_prompt)


def grids(path: Path, panels: Mapping[str, Tensor], labels: Sequence[int], per_prompt: int) -> None:
    """Save pictures `(N, 3, H, W)` of each title side by side, with a row per prompt."""
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 7), layout="constrained")
    for axis, (title, pixels) in zip(axes, panels.items(), strict=True):
        rows = []
        for digit in range(len(WORDS)):
            of_digit = [index for index, label in enumerate(labels) if label == digit][:per_prompt]
            rows.append(torch.cat(list(pixels[of_digit]), dim=2))
        size = pixels.shape[-1]
        axis.imshow(torch.cat(rows, dim=1).permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([size * (row + 0.5) for row in range(len(WORDS))], WORDS if axis is axes[0] else [])
        axis.tick_params(length=0)
    figure.suptitle('prompts: "a handwritten ..."')
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Save curves of loss, AAF rate, implicit accuracy and squared errors over the updates; a line where an iteration begins."""
    panels = (
        ("loss", {"loss": "loss"}),
        ("AAF rate (share of sign -1)", {"aaf_rate": "AAF rate"}),
        ("implicit accuracy (share of logit > 0)", {"implicit_acc": "implicit accuracy"}),
        ("policy's squared error", {"model_mse_winner": "winner", "model_mse_loser": "reference sample"}),
    )
    updates = [row["update"] for row in rows]
    starts = [row["update"] for row, last in zip(rows[1:], rows, strict=False) if row["iteration"] != last["iteration"]]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels, strict=True):
        for key, label in lines.items():
            values = [float("nan") if row[key] is None else row[key] for row in rows]
            axis.plot(updates, values, label=label, linewidth=1)
        for start in starts:
            axis.axvline(start - 0.5, color="0.85", linewidth=0.8, zorder=0)
        axis.set_title(title)
        axis.set_xlabel("update")
        if len(lines) > 1:
            axis.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write_result(
    path: Path, base: Scores, trained: Scores, judge: Judge, rows: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float], settings: Mapping[str, Any],
) -> None:
    """Writes all measured values, and machine and settings, as JSON."""
    result = about_run(rows, seconds, settings) | {
        "judge": {"accuracy_on_real_digits": judge.accuracy, "distance_threshold": judge.threshold},
        "base": asdict(base),
        "seppo": asdict(trained),
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


def about_run(rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float], settings: Mapping[str, Any],
              *modules: ModuleType) -> dict[str, Any]:
    """What a result holds besides its scores: machine, versions (also of `modules`), settings, times, training."""
    return {
        "machine": machine(),
        "versions": {module.__name__: module.__version__
                     for module in (torch, diffusers, transformers, deepspeed, *modules, matplotlib)},
        "commit": commit(),
        "settings": settings,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seconds_in_training": {
            name: round(sum(row[f"seconds_{name}"] for row in rows), 1) for name in ("sampling", "training", "data")
        },
        "first_iteration": {key: iteration_mean(rows, key, 0) for key in FIGURES if key in rows[0]},
        "last_iteration": {key: iteration_mean(rows, key, -1) for key in FIGURES if key in rows[0]},
        "updates": len(rows),
    }
