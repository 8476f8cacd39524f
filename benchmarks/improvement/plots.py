"""Draws improvement.json: `python -m benchmarks.improvement.plots benchmarks/results`."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.improvement.report import BASE, MEASURES, METHODS, Result, interval, of_data, runs_of, scores  # noqa: E402

COLOURS = {"sft": "tab:orange", "dpo": "tab:red", "spin": "tab:blue", "iterative": "black", "iterative_few": "0.6",
           "iterative_spin": "tab:green"}


def figures(folder: Path, result: Result) -> None:
    """improvement.png: each measure over the iterations, with the winners' mean."""
    seeds = result["settings"]["seeds"]
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(5 * len(MEASURES), 4.2), layout="constrained")
    for axis, (name, measure) in zip(axes, MEASURES.items(), strict=True):
        for method, colour in COLOURS.items():
            runs = runs_of(result, method)
            if not runs:
                continue
            from_spin = METHODS[method].from_spin and bool(runs_of(result, "spin"))
            start = scores(result, "spin" if from_spin else BASE, name)
            found = [interval(start), *(interval(scores(result, method, name, point)) for point in range(len(runs[0]["points"])))]
            places = range(len(found))
            axis.plot(places, [each.mean for each in found], "o-", color=colour, label=METHODS[method].label, markersize=3)
            axis.fill_between(places, [each.low for each in found], [each.high for each in found], color=colour, alpha=0.12,
                              linewidth=0)
        winners = interval(of_data(result, "winners", name)).mean
        axis.axhline(winners, color="tab:purple", linestyle=":", label="the data's winners")
        axis.set_xlabel("iterations")
        axis.set_xticks(range(result["settings"]["iterations"] + 1))
        axis.set_ylabel(measure.label + (" (less is better)" if measure.sign < 0 else ""))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"mean{' and 95 % interval' * (seeds > 1)} over {seeds} seed{'s' * (seeds > 1)}", fontsize=11)
    figure.savefig(folder / "improvement.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    figures(Path(sys.argv[1]), json.loads((Path(sys.argv[1]) / "improvement.json").read_text()))
