"""Plots of loss_<device>.json: `python -m benchmarks.loss.plots benchmarks/results/loss_cpu.json`."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

from benchmarks.loss.summary import FUSED, TARGETS  # noqa: E402

COLOURS = {"eager": "tab:red", "compile": "tab:blue", "liger_style": "tab:purple", "fused": "black", "copy": "tab:green"}
LABELS = {"eager": "eager (App. B.2)", "compile": "torch.compile", "liger_style": "Liger's pattern", "copy": "copy of 4 N"}


def draw(path: Path) -> None:
    """Two figures beside the JSON file: <name>_ratio.png and <name>_bandwidth.png."""
    result = json.loads(path.read_text())
    device = path.stem.removeprefix("loss_")
    for kind, panel in (("ratio", ratio_panel), ("bandwidth", bandwidth_panel)):
        dtypes = list(dict.fromkeys(row["dtype"] for row in result["ratios"] if row["shape"] == "sd15"))
        if not dtypes:
            return
        figure, panels = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes) + 1.8, 4.2), sharey=True, squeeze=False,
                                      layout="constrained")
        for axes, dtype in zip(panels[0], dtypes, strict=True):
            panel(axes, result, dtype, device)
            axes.set_title(f"{dtype}, SD-1.5 latents", fontsize=10)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.set_xlabel("pairs in a batch")
            axes.grid(alpha=0.3, which="both")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
        figure.suptitle(f"seppo_loss, forward + backward: {where(result)}", fontsize=10)
        figure.savefig(path.with_name(f"{path.stem}_{kind}.png"), dpi=130)
        plt.close(figure)


def where(result: dict) -> str:
    machine = result["machine"]
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{name}, torch {result['versions']['torch']}"


def ratio_panel(axes: Axes, result: dict, dtype: str, device: str) -> None:
    rows = sorted((row for row in result["ratios"] if (row["what"], row["shape"], row["dtype"]) ==
                   ("forward_backward", "sd15", dtype)), key=lambda row: row["pairs"])
    for name in ("eager", "compile", "liger_style"):
        axes.plot([row["pairs"] for row in rows], [row[f"{name}_over_fused"] for row in rows], "o-", color=COLOURS[name],
                  label=LABELS[name])
    for target in TARGETS[device]:
        name = target.ratio.removesuffix("_over_fused")
        if name in COLOURS and (target.what, target.shape) == ("forward_backward", "sd15") and target.at_least:
            pairs = [n for n, _ in target.cases]
            axes.plot([min(pairs), max(pairs)], [target.at_least] * 2, ":", color=COLOURS[name],
                      label=f"target: {target.at_least:g}x")
    axes.axhline(1, color=COLOURS["fused"], linewidth=1, label="fused loss")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_ylabel("time, in units of the fused loss's")


def bandwidth_panel(axes: Axes, result: dict, dtype: str, device: str) -> None:
    rows = [row for row in result["rows"] if (row["what"], row["shape"], row["dtype"]) == ("forward_backward", "sd15", dtype)]
    fused = next(name for name in FUSED if any(row["implementation"] == name for row in rows))
    for name in (fused, "copy", "compile", "liger_style", "eager"):
        line = sorted((row["pairs"], row["gb_s"]) for row in rows if row["implementation"] == name)
        axes.plot(*zip(*line, strict=True), "o-", color=COLOURS["fused" if name == fused else name],
                  label=LABELS.get(name, f"fused loss ({name})"))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB/s (4 N elements over the time of a call)")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw(Path(name))
