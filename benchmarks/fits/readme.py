"""The tables of what fits on which card, from fits.json, and of hours with cheaper rollouts, from hours.json."""

import json
from pathlib import Path

from benchmarks.fits import CARDS, SHARE
from benchmarks.result_files import Row


def fits(results: Path) -> str:
    """A row for each family, or the sentence that nothing was planned."""
    path = results / "fits.json"
    if not path.exists():
        return "Not planned yet (`python -m benchmarks.fits --out benchmarks/results`, then `make readme`)."
    result = json.loads(path.read_text())
    lines = [f"| | as configured | {' | '.join(f'{card} GB' for card in CARDS)} |", "|---" * (2 + len(CARDS)) + "|"]
    for found in result["rows"]:
        frames = f", {found['frames']} frames" if found["frames"] else ""
        size = f"{found['parameters'] / 1e9:.3g} B, {found['resolution']} pixels{frames}"
        about = f"{found['name']}, {size} (`{found['configuration']}`)"
        cells = " | ".join(cell(found["cards"][str(card)]) for card in CARDS)
        lines.append(f"| {about} | {found['bytes'] / 1e9:.3g} GB | {cells} |")
    return "\n".join([*lines, "", f"Planned, not run, on one GPU, commit `{result['commit']}`, diffusers"
                      f" {result['versions']['diffusers']}. Fits: at most {SHARE:.0%} of the card. A cell has the pairs of a"
                      " micro-batch, the samples that are drawn at once, the plan's bytes, and what is changed to save memory."])


def hours(results: Path) -> str:
    """A row for each way to draw rollouts, or the sentence that nothing was planned."""
    path = results / "hours.json"
    if not path.exists():
        return "Not planned yet (`python -m benchmarks.fits.hours --out benchmarks/results`, then `make readme`)."
    result = json.loads(path.read_text())
    lines = ["| | calls a sample | TFLOP a pair | of it sampling | hours on 8 A100 | fewer |", "|---|---|---|---|---|---|"]
    whole: dict[str, float] = {}
    for row in result["rows"]:
        first = whole.setdefault(row["family"], row["hours"])  # the family's first row is what the others are compared with
        fewer = "" if first == row["hours"] else f"{first / row['hours']:.1f}x"
        lines.append(f"| {row['name']} (`{row['configuration']}`) | {row['calls']} | {row['pair_tflop']:.3g} |"
                     f" {row['sampling_tflop'] / row['pair_tflop']:.0%} | {row['hours']:.3g} | {fewer} |")
    return "\n".join([*lines, "", f"Planned, not run: FLOPs over the plan's rate of an {result['rows'][0]['device']}, commit"
                      f" `{result['commit']}`, diffusers {result['versions']['diffusers']}. A call is one evaluation of the"
                      " network; a pair's FLOPs have the share of a sample that it uses."])


def cell(found: Row) -> str:
    """What fits on one card."""
    changes = f"; {', '.join(found['labels'])}" if found["labels"] else ""
    size = f"{found['bytes'] / 1e9:.3g} GB"
    if not found["fits"]:
        return f"no: {found['phase']} {size}{changes}"
    return f"{found['micro']} and {found['samples']}, {size}{changes}"
