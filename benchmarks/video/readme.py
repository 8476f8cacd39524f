"""The README's block on decoding videos, from video_*.json."""

import json
from pathlib import Path

from benchmarks.result_files import Row

CHOICES = {"uniform": "whole clip", "window": "window"}


def video(results: Path) -> str:
    """A table for each machine that decoded videos, a line for each that trained on them, and a sentence where none did."""
    files = sorted(results.glob("video_*.json"))
    tables = [block(json.loads(path.read_text()), path.name) for path in files] or [
        "Decoding: not measured yet (`python -m benchmarks.video --out benchmarks/results`, then `make readme`)."]
    lines, on_gpu = [], False
    for path in sorted([*results.glob("waiting_*.json"), *results.glob("gpu_suite*.json")]):
        result = json.loads(path.read_text())
        found = result.get("video", result)
        if "waiting_share" in found:
            lines.append(waiting(found, result, path.name))
            on_gpu |= "gpu" in result["machine"]
    if not on_gpu:
        lines.append("Waiting on a GPU (target: at most 5% of the time): not measured yet"
                     " (`python -m benchmarks.gpu_suite --out DIR --only video`).")
    return "\n\n".join([*tables, *lines])


def waiting(found: Row, result: Row, file: str) -> str:
    """How long training waits for clips that are decoded meanwhile."""
    machine, seconds = result["machine"], found["seconds"]
    on = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    spent = ", ".join(f"{name} {value:g} s" for name, value in seconds.items())
    return (f"Training waits for its clips {found['waiting_share']:.1%} of the time on {on} (`{found['config']}` with random"
            f" windows, decoded and encoded meanwhile; an update: {spent}; commit `{result['commit']}`;"
            f" [JSON](results/{file})).")


def block(result: Row, file: str) -> str:
    """What was measured on one machine, with its largest number of threads."""
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    most = max(row["threads"] for row in result["rows"])
    head = (f"Decoded frames per second at {settings['resolution']} pixels, {settings['frames']} frames of clips of"
            f" {settings['length']}, on {machine['cpu']}, {machine['cores']} cores, {most} thread{'s' * (most > 1)}; DALI"
            f" {versions['dali']} (its CPU decoder), PyAV {versions['av']}, commit `{result['commit']}`, load average"
            f" {machine['load_average_at_start']} to {result['load_average_at_end']}; figures:"
            f" [JSON](results/{file}).")
    lines = ["| codec, size, frames | DALI | PyAV | DALI over PyAV |", "|---|---|---|---|"]
    for row in (row for row in result["rows"] if row["threads"] == most):
        rates = [f"{row[key]:.0f}" if key in row else "-" for key in ("dali_frames_per_s", "pyav_frames_per_s")]
        ratio = f"{row['dali_over_pyav']:.2f}x" if "dali_over_pyav" in row else "not decoded by DALI here"
        lines.append(f"| {row['codec']}, {row['size']}, {CHOICES[row['choice']]} | {' | '.join(rates)} | {ratio} |")
    return "\n".join([head, "", *lines])
