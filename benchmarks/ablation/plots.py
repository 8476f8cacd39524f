"""Plots of ablation.json, as in the paper's Figures 2 and 3: `python -m benchmarks.ablation.plots benchmarks/results`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.ablation.report import MAIN, MEASURES, Result, runs_of  # noqa: E402
from benchmarks.ablation.runs import BASE  # noqa: E402
from benchmarks.intervals import interval  # noqa: E402

LINES = {"initial": ("reference = initial", "tab:red"), "latest": ("reference = latest", "tab:blue"),
         MAIN: ("uniform (SePPO-w)", "black"), "sft": ("SFT", "tab:orange")}


def figures(folder: Path, result: Result) -> None:
    """ablation_figure2.png and ablation_figure3.png."""
    seeds = result["settings"]["seeds"]
    over = f"mean{' and 95 % interval' * (seeds > 1)} over {seeds} seed{'s' * (seeds > 1)}"
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, measure in zip(axes, MEASURES, strict=True):
        for method in ("initial", "latest", MAIN):
            draw_scores(axis, result, method, measure, *LINES[method])
        finish(axis, MEASURES[measure])
    figure.suptitle(f"choice of the reference (Figure 2): {over}", fontsize=11)
    figure.savefig(folder / "ablation_figure2.png", dpi=110)
    plt.close(figure)

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.2), layout="constrained")
    draw_scores(axes[0], result, MAIN, "prompt_accuracy", "prompt accuracy", "black")
    draw_rates(axes[0].twinx(), result)
    finish(axes[0], "SePPO's prompt accuracy")
    for axis, measure in zip(axes[1:], MEASURES, strict=True):
        for method in ("sft", MAIN):
            draw_scores(axis, result, method, measure, *LINES[method])
        finish(axis, MEASURES[measure])
    figure.suptitle(f"AAF rate and accuracy, and SFT against SePPO (Figure 3): {over}", fontsize=11)
    figure.savefig(folder / "ablation_figure3.png", dpi=110)
    plt.close(figure)


def draw_scores(axis: Axes, result: Result, method: str, measure: str, label: str, colour: str) -> None:
    """A measure of the base and of the past policies of a method."""
    runs, bases = runs_of(result, method), runs_of(result, BASE)
    if not runs:
        return
    curves = [[*base["points"], *run["points"]] for base, run in zip(bases, runs, strict=True)]
    line(axis, [point["update"] for point in curves[0]], [[point[measure] for point in curve] for curve in curves], label, colour)


def draw_rates(axis: Axes, result: Result) -> None:
    """SePPO's AAF rate, each iteration's mean at its middle."""
    runs, updates = runs_of(result, MAIN), result["settings"]["updates"]
    if runs:
        middles = [(k + 0.5) * updates for k in range(result["settings"]["iterations"])]
        line(axis, middles, [run["aaf_rate"] for run in runs], "AAF rate", "tab:green")
    axis.set_ylabel("AAF rate (share of sign -1)", color="tab:green")


def line(axis: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], label: str, colour: str) -> None:
    """The mean of the seeds' curves and its interval as a band."""
    at = [interval(values) for values in zip(*curves, strict=True)]
    axis.plot(x, [mean(values) for values in zip(*curves, strict=True)], "o-", color=colour, label=label, markersize=3)
    axis.fill_between(x, [found.low for found in at], [found.high for found in at], color=colour, alpha=0.15, linewidth=0)


def finish(axis: Axes, label: str) -> None:
    axis.set_xlabel("updates")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


if __name__ == "__main__":
    figures(Path(sys.argv[1]), json.loads((Path(sys.argv[1]) / "ablation.json").read_text()))
