"""This quickstart's result: a table and result.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seppo_fast.quickstart.improvement.judge import Scores
from seppo_fast.quickstart.report import about_run

# name, label, how it is written, how much one unit is in print
MEASURES = (("level", "level", "{:.2f}", 1), ("prompt_accuracy", "prompt accuracy", "{:.1f}%", 100),
            ("distance", "distance", "{:.2f}", 1), ("vendi", "Vendi", "{:.2f}", 1))


def table(scores: Mapping[str, Scores]) -> str:
    """A row for each of `scores`, as text, and what the measures are."""
    width = max(map(len, scores)) + 2
    lines = ["", " " * width + "".join(f"{label:>17}" for _, label, _, _ in MEASURES)]
    for name, found in scores.items():
        cells = (form.format(unit * getattr(found, key)) for key, _, form, unit in MEASURES)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join([
        *lines, "",
        "level: degradation that a regressor reads in a sample, 0 a clean digit, 1 one that can hardly be seen. prompt accuracy:",
        "  share of samples that a classifier reads as the prompt's digit. distance: to the nearest held-out digit (less is",
        "  better).",
        "  Vendi: how many different digits the samples of a prompt amount to, on restored samples, so that grain counts little.",
    ])


def write_result(path: Path, scores: Mapping[str, Scores], rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float],
                 settings: Mapping[str, Any]) -> None:
    """Writes all measured values, and machine and settings, as JSON; `rows` are stage two's."""
    result = about_run(rows, seconds, settings) | {"scores": {name: asdict(found) for name, found in scores.items()}}
    path.write_text(json.dumps(result, indent=2) + "\n")
