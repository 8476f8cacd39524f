"""The README's block on decoding videos, from video_*.json."""

import json
from pathlib import Path

from benchmarks.loss_summary import Row

CHOICES = {"uniform": "whole clip", "window": "window"}


def video(results: Path) -> str:
    """A table for each machine that measured something; in words where none did."""
    files = sorted(results.glob("video_*.json"))
    return "\n\n".join(block(json.loads(path.read_text()), path.name) for path in files) or (
        "Not measured yet (`python -m benchmarks.video --out benchmarks/results`, then `make readme`).")


def block(result: Row, file: str) -> str:
    """What was measured on one machine: the rows of the most threads, and how it goes with fewer."""
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    most = max(row["threads"] for row in result["rows"])
    head = (f"Decoded frames per second at {settings['resolution']} pixels, {settings['frames']} frames of clips of"
            f" {settings['length']}, on {machine['cpu']}, {machine['cores']} cores, {most} thread{'s' * (most > 1)}; DALI"
            f" {versions['dali']} (its CPU decoder), PyAV {versions['av']}, commit `{result['commit']}`, load average"
            f" {machine['load_average_at_start']} to {result['load_average_at_end']}; figures:"
            f" [JSON](benchmarks/results/{file}).")
    lines = ["| codec, size, frames | DALI | PyAV | DALI over PyAV |", "|---|---|---|---|"]
    for row in (row for row in result["rows"] if row["threads"] == most):
        rates = [f"{row[key]:.0f}" if key in row else "-" for key in ("dali_frames_per_s", "pyav_frames_per_s")]
        ratio = f"{row['dali_over_pyav']:.2f}x" if "dali_over_pyav" in row else "not decoded by DALI here"
        lines.append(f"| {row['codec']}, {row['size']}, {CHOICES[row['choice']]} | {' | '.join(rates)} | {ratio} |")
    return "\n".join([head, "", *lines])
