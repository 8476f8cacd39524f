"""The tables of what fits on which card (fits.json), of hours with cheaper rollouts (hours.json) and on more GPUs (gpus.json), and
of a plan beside a measurement (ranks_cpu.json).
"""

import json
from pathlib import Path

from benchmarks.fits import CARDS, MOST_APART, SHARE
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


def gpus(results: Path) -> str:
    """A row for each number of GPUs, or the sentence that nothing was planned."""
    path = results / "gpus.json"
    if not path.exists():
        return "Not planned yet (`python -m benchmarks.fits.gpus --out benchmarks/results`, then `make readme`)."
    result = json.loads(path.read_text())
    parts = ("sampling", "training", "communication", "stragglers", "writing")
    lines = [f"| GPUs | pairs a rank | rollouts a rank | in all | {' | '.join(parts)} | memory a rank |", f"|{'---|' * 10}"]
    for row in result["rows"]:
        spent = row["hours"]
        if spent is None:
            lines.append(f"| {row['gpus']} | {' | '.join('-' * 9)} |")
            continue
        shares = " | ".join(f"{spent[part] / spent['all']:.1%}" for part in parts)
        lines.append(f"| {row['gpus']} | {row['share']} in {row['accumulation']} | {spent['rollouts']} in {spent['batches']} |"
                     f" {row['in_all']} | {shares} | {spent['memory'] / 1e9:.3g} GB |")
    notes = [f"- {row['gpus']} GPUs: {row['note']}" for row in result["rows"] if row["note"]]
    about = "; ".join(line.strip() for line in result["assumptions"])
    return "\n".join([*lines, "", *notes, "", f"Planned, not run: `{result['configuration']}`, {result['pairs']} pairs, on"
                      f" {result['device']}, commit `{result['commit']}`, diffusers {result['versions']['diffusers']}. Pairs are"
                      f" those of an update, in so many micro-batches; rollouts are drawn in so many batches. {about}."])


def ranks(results: Path) -> str:
    """The plan's ratio of one rank to two beside the measured one, or the sentence that nothing was measured."""
    path = results / "ranks_cpu.json"
    if not path.exists():
        return "Not measured yet (`python -m benchmarks.fits.ranks --out benchmarks/results`, then `make readme`)."
    result = json.loads(path.read_text())
    lines = ["| ranks | seconds an update | of it sampling | training |", "|---|---|---|---|"]
    for row in result["ranks"]:
        lines.append(f"| {row['ranks']} | {row['seconds']:.3f} | {row['sampling']:.3f} | {row['training']:.3f} |")
    verdict = "met" if abs(result["apart"]) <= MOST_APART else "**missed**"
    machine, size = result["machine"], result["gradient_bytes"] / 1e6
    return "\n".join([*lines, "", f"Two ranks are {result['measured']:.2f} times as fast as one, and by the plan"
                      f" {result['predicted']:.2f} times: {result['apart']:+.1%} (at most {MOST_APART:.0%}: {verdict}). Medians of"
                      f" {result['updates']} updates in each of {result['rounds']} rounds, {machine['cpu']}, a thread a rank, load"
                      f" average {machine['load_average_at_start']} at the start, torch {result['versions']['torch']}, commit"
                      f" `{result['commit']}`. Gradients of {size:.3g} MB an update over gloo and loopback,"
                      f" measured: {result['link_gb_s']:.2f} GB/s. Two processes at once that send nothing are slower by"
                      f" {result['slower_at_once']:.1%} than one; with the plan's usual 5% in place of this,"
                      f" {result['predicted_with_assumed_stragglers']:.2f} times would be expected."])


def cell(found: Row) -> str:
    """What fits on one card."""
    changes = f"; {', '.join(found['labels'])}" if found["labels"] else ""
    size = f"{found['bytes'] / 1e9:.3g} GB"
    if not found["fits"]:
        return f"no: {found['phase']} {size}{changes}"
    return f"{found['micro']} and {found['samples']}, {size}{changes}"
