"""The front, from time_to_quality_TASK.json: `python -m benchmarks.time_to_quality.plots RESULT.json PICTURE.png`."""

import json
import sys
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.intervals import interval  # noqa: E402
from benchmarks.time_to_quality.comparisons import MEASURES  # noqa: E402
from benchmarks.time_to_quality.curves import Result, curve, seeds_of  # noqa: E402
from benchmarks.time_to_quality.report import compared, label  # noqa: E402
from benchmarks.time_to_quality.ways import PAPER  # noqa: E402


def front(file: Path, result: Result) -> None:
    """Quality over FLOPs, a panel for each measure: each way's mean over the seeds, with the interval where it ends."""
    panels = MEASURES | {"vendi": "Vendi within a prompt"}
    figure, axes = plt.subplots(1, len(panels), figsize=(17, 5), layout="constrained")
    for axis, (measure, name) in zip(axes, panels.items(), strict=True):
        draw(axis, result, measure)
        axis.set_xscale("log")
        axis.set_xlabel("FLOPs of sampling, training and scoring")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    seeds = len(seeds_of(result))
    figure.suptitle(f"quality over counted FLOPs: mean over {seeds} seed{'s' * (seeds > 1)}"
                    + ", the last policy with its 95 % interval" * (seeds > 1), fontsize=11)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw(axis: Axes, result: Result, measure: str) -> None:
    """All ways, and the base as a line."""
    seeds, colours = seeds_of(result), plt.get_cmap("tab20")
    axis.axhline(mean(curve(result, PAPER, seed)[0][measure] for seed in seeds), color="grey", linestyle=":", label="base")
    for place, way in enumerate((PAPER, *compared(result))):
        policies = list(zip(*(curve(result, way, seed)[1:] for seed in seeds), strict=True))
        x = [mean(point["flops"] for point in points) for points in policies]
        found = [interval([point[measure] for point in points]) for points in policies]
        colour = "black" if way == PAPER else colours(place % 20)
        axis.plot(x, [each.mean for each in found], "o-", color=colour, label=label(result, way), markersize=3, linewidth=1)
        axis.errorbar(x[-1], found[-1].mean, yerr=found[-1].half or 0.0, color=colour, capsize=3, marker="o", markersize=6)


if __name__ == "__main__":
    front(Path(sys.argv[2]), json.loads(Path(sys.argv[1]).read_text()))
