"""Draws flipper.json: `python -m benchmarks.flipper.plots benchmarks/results`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.flipper.comparisons import MEASURES, Result, runs_of, told  # noqa: E402
from benchmarks.flipper.report import levels  # noqa: E402
from benchmarks.flipper.runs import TIMES, WATCHED  # noqa: E402
from benchmarks.intervals import interval  # noqa: E402

COLOURS = {"prompt": "black", "distance": "tab:orange"}


def figures(folder: Path, result: Result) -> None:
    """flipper.png: the area under the curve within an update, over the noise level and over the number of noises."""
    runs = runs_of(result, WATCHED)
    if not runs:
        return
    seeds = result["settings"]["seeds"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    counts = list(runs[0]["told"]["agreeing"])
    for measure, label in MEASURES.items():
        places = [place for _, place in levels(result)]
        middles = [(i + 0.5) / len(places) for i in range(len(places))]
        line(axes[0], middles, [told(result, measure, "within", *place) for place in places], label, COLOURS[measure], "-")
        for where, style, words in (("same", "-", "at the pair's timestep"), ("other", "--", "and timesteps")):
            there = [n for n in counts if where == "same" or int(n) <= TIMES]
            at = [told(result, measure, "within", where, n) for n in there]
            line(axes[1], [float(n) for n in there], at, f"{label}, noises {words}", COLOURS[measure], style)
    axes[0].set_xlabel("noise level (share of the timesteps)")
    axes[0].set_ylabel("AUC within an update")
    axes[1].set_xlabel("noises of the winner")
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks([float(n) for n in counts], counts)
    for axis in axes:
        axis.axhline(0.5, color="tab:red", linestyle=":", label="a coin")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("does m_w - q_w tell whether the reference's sample is better than the policy's own:"
                    f" mean{' and 95 % interval' * (seeds > 1)} over {seeds} seed{'s' * (seeds > 1)}", fontsize=11)
    figure.savefig(folder / "flipper.png", dpi=110)
    plt.close(figure)


def line(axis: Axes, x: Sequence[float], values: Sequence[Sequence[float | None]], label: str, colour: str, style: str) -> None:
    """The seeds' means and intervals, where there are any."""
    there = [(at, interval([value for value in each if value is not None])) for at, each in zip(x, values, strict=True)
             if any(value is not None for value in each)]
    places, found = [at for at, _ in there], [each for _, each in there]
    axis.plot(places, [each.mean for each in found], "o" + style, color=colour, label=label, markersize=3)
    axis.fill_between(places, [each.low for each in found], [each.high for each in found], color=colour, alpha=0.12, linewidth=0)


if __name__ == "__main__":
    figures(Path(sys.argv[1]), json.loads((Path(sys.argv[1]) / "flipper.json").read_text()))
