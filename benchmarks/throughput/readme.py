"""The README's block on throughput, from throughput_*.json and the GPU suites."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.result_files import Row
from benchmarks.throughput.summary import targets

TRAINERS = {"obvious": "obvious, a prompt a call", "obvious_batched": "obvious, a batch a call", "ours": "ours"}
PARTS = ("sampler", "loop", "training_memory", "micro_batch", "swap")  # of a GPU suite


def throughput(results: Path) -> str:
    """A part for each device: its figures, or the sentence that nothing was measured on it."""
    blocks_of = {"On the CPU": [], "On a GPU": []}
    for path in sorted(results.glob("throughput_*.json")):
        result = json.loads(path.read_text())
        device = "On a GPU" if "gpu" in result["machine"] else "On the CPU"
        blocks_of[device].append(block(result, "cuda" if "gpu" in result["machine"] else "cpu", path.name))
    for path in sorted(results.glob("gpu_suite*.json")):
        suite = json.loads(path.read_text())
        if any(part in suite for part in PARTS):
            blocks_of["On a GPU"].append(block(suite, "cuda", path.name))
    ways = {"On the CPU": "python -m benchmarks.throughput --out benchmarks/results",
            "On a GPU": "python -m benchmarks.gpu_suite --out DIR --only throughput"}
    return "\n\n".join(text for device, blocks in blocks_of.items()
                       for text in blocks or [f"{device}: not measured yet (`{ways[device]}`, then `make readme`)."])


def block(result: Row, device: str, file: str) -> str:
    """What was measured on one machine."""
    machine = result["machine"]
    loads = [load for part in result.values() if isinstance(part, dict) for load in part.get("load_average", [])]
    on = machine["gpu"] if device == "cuda" else f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    torch = machine.get("torch") or result["versions"]["torch"]
    load = f", load average {min(loads):g} to {max(loads):g}" if loads else ""
    profiles = [f"[{name}](results/{file.removesuffix('.json')}_{name}_profile.txt)"
                for name in result.get("profiled", [])]
    files = f"figures: [JSON](results/{file})" + (f"; what takes the time: {', '.join(profiles)}" if profiles else "")
    older = {name: part["commit"] for name, part in result.items()
             if isinstance(part, dict) and part.get("commit", result["commit"]) != result["commit"]}
    before = "".join(f"; {name} of commit `{commit}`" for name, commit in older.items() if name in PARTS or name == "ranks")
    parts = [f"On {on}, torch {torch}, commit `{result['commit']}`{before}{load}; {files}.", loop_table(result.get("loop", {})),
             sampler_table(result.get("sampler", {})), ranks_line(result.get("ranks", {})),
             memory_table(result.get("training_memory", {})), micro_batch_table(result.get("micro_batch", {})),
             swap_line(result.get("swap", {})),
             target_list(targets(result, device))]
    return "\n\n".join(part for part in parts if part)


def loop_table(loop: Row) -> str:
    """Pairs per second of the trainers, and the seconds of an update's phases."""
    if not loop.get("rows"):
        return ""
    case, rates = loop["case"], loop["pairs_per_s"]
    lines = [f"The whole loop: {case['name']}, {case['steps']} steps, {case['batch']} pairs an update in micro-batches of"
             f" {case['micro']}; seconds of the last run's median update.", "",
             "| trainer | pairs/s | ours is | sampling, s | data, s | training, s | peak memory, GB |",
             "|---|---|---|---|---|---|---|"]
    for trainer in (name for name in TRAINERS if name in rates):
        row = [row for row in loop["rows"] if row["trainer"] == trainer][-1]
        ratio = f"{loop[f'ours_over_{trainer}']:.2f}x" if f"ours_over_{trainer}" in loop else "-"
        seconds = " | ".join(f"{row[f'{phase}_s']:.2f}" for phase in ("sampling", "data", "training"))
        lines.append(f"| {TRAINERS[trainer]} | {rates[trainer]:.2f} | {ratio} | {seconds} | {row['peak_gb']:.2f} |")
    return "\n".join(lines)


def sampler_table(sampler: Row) -> str:
    """Images per second over the batch."""
    if not sampler.get("ratios"):
        return ""
    lines = [f"The sampler with guidance, beside diffusers as it is and compiled. The device's matrix products reach"
             f" {sampler['matmul_tflops']:.3g} TFLOP/s.", "",
             "| network, steps, batch | images/s | of the matrix-product rate | over diffusers | over diffusers compiled |",
             "|---|---|---|---|---|"]
    for row in sorted(sampler["ratios"], key=lambda row: (row["network"], row["steps"], row["batch"])):
        ratios = " | ".join(f"{row[key]:.2f}x" if key in row else "-" for key in ("over_diffusers_eager", "over_diffusers"))
        lines.append(f"| {row['network']}, {row['steps']}, {row['batch']} | {row['images_per_s']:.3g} | {row['of_matmul']:.1%} |"
                     f" {ratios} |")
    return "\n".join(lines)


def ranks_line(ranks: Row) -> str:
    """Two ranks against one."""
    if "two_over_one" not in ranks:
        return ""
    rates = ranks["pairs_per_s"]
    share = "the same number" if ranks["shared_evenly"] else "different numbers"
    return (f"Ranks: {rates['1']:.1f} pairs/s with one on one core, {rates['2']:.1f} with two on two; both drew {share} of"
            " samples in every update.")


def memory_table(memory: Row) -> str:
    """Measured peaks beside the plan's."""
    if not memory.get("rows"):
        return ""
    return "\n".join(["| training SD-1.5 in full, local batch 1 | measured, GB | planned, GB |", "|---|---|---|",
                      *(f"| {', '.join(row['settings'])} | {row['measured_gb']:.2f} | {row['planned_gb']:.2f} |"
                        for row in memory["rows"])])


def micro_batch_table(found: Row) -> str:
    """A micro-batch's time and launches, compiled or not."""
    if not found.get("rows"):
        return ""
    lines = ["Forward and backward of a micro-batch, policy and reference. Calls are operators on the CPU, kernels on a GPU.", "",
             "| network, pairs | `model.compile` | ms | calls | GPU waits for the host | first, s |", "|---|---|---|---|---|---|"]
    for row in found["rows"]:
        idle = f"{row['idle']:.0%} of the time, {row['launches']} launches" if "idle" in row else "-"
        lines.append(f"| {row['network']}, {row['pairs']} | {row['compile']} | {row['ms']:.1f} | {row['calls']} | {idle} |"
                     f" {row['first_s']:.1f} |")
    return "\n".join(lines)


def swap_line(swap: Row) -> str:
    """The time that a change of the reference takes."""
    rows = swap.get("rows", [])
    if not rows:
        return ""
    times = ", ".join(f"{1e3 * row['seconds']:.3g} ms from {row['from']} ({row['gb_s']:.1f} GB/s)" for row in rows)
    return f"Another reference, {rows[0]['bytes'] / 1e6:.3g} MB of {rows[0]['network']}: {times}."


def target_list(judged: Sequence[Row]) -> str:
    """Each target, met or missed."""
    verdicts = {True: "met", False: "**missed**", None: "not measured"}
    values = [f", {row['value']:g} ({row['where']})" if "value" in row else "" for row in judged]
    return "\n".join(f"- {row['target']}: {verdicts[row['met']]}{value}" for row, value in zip(judged, values, strict=True))
