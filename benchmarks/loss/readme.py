"""The README's block on the loss, from loss_cpu.json and the GPU suites."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.loss.summary import of_gpu_suite, targets
from benchmarks.result_files import Row

SHAPE_NAMES = {"sd15": "SD-1.5, 512x512", "sdxl": "SDXL, 1024x1024", "video": "video, 16 x 256x256",
               "sd3_1024": "SD3-like, 1024x1024"}


def loss(results: Path) -> str:
    """Figures of the fused loss from loss_cpu.json and from each GPU suite, or a sentence that nothing was measured."""
    return "\n\n".join([loss_on_cpu(results / "loss_cpu.json"), *map(loss_on_gpu, sorted(results.glob("gpu_suite*.json")))])


def loss_on_cpu(path: Path) -> str:
    if not path.exists():
        return "On the CPU: not measured yet (`python -m benchmarks.loss --out benchmarks/results`, then `make readme`)."
    result = json.loads(path.read_text())
    machine, versions = result["machine"], result["versions"]
    load = f"{machine['load_average_at_start']} to {machine['load_average_at_end']}"
    parts = [f"Forward + backward on {machine['cpu']}, {machine['threads']} of {machine['cores']} cores, torch {versions['torch']},"
            f" commit `{result['commit']}`, load average {load}; inputs rotate through {result['settings']['rotate_mb']} MB."
            " Plots: [ratios](results/loss_cpu_ratio.png), [bandwidth](results/loss_cpu_bandwidth.png);"
            " figures: [JSON](results/loss_cpu.json), [CSV](results/loss_cpu.csv).",
            ratio_table(result["ratios"]), target_list(result["targets"])]
    return "\n\n".join(parts)


def loss_on_gpu(path: Path) -> str:
    suite = json.loads(path.read_text())
    machine, found = suite["machine"], of_gpu_suite(suite)
    parts = [f"Forward + backward on {machine['gpu']}, torch {machine['torch']}, driver {machine['driver']}, commit"
            f" `{suite['commit']}`. The time of a call includes the host's; \"of copy\" compares times on the device."
            f" [All figures](results/{path.name}).", ratio_table(found), target_list(targets(found, "cuda"))]
    return "\n\n".join(parts)


def ratio_table(found: Sequence[Row]) -> str:
    """One line for each batch, with the same columns for each dtype, and one line on memory."""
    rows = {(row["shape"], row["pairs"], row["dtype"]): row for row in found if row["what"] == "forward_backward"}
    dtypes = list(dict.fromkeys(dtype for _, _, dtype in rows))
    batches = sorted({(shape, pairs) for shape, pairs, _ in rows}, key=lambda batch: (list(SHAPE_NAMES).index(batch[0]), batch[1]))
    columns = (("µs", "fused_us", "{:.0f}"), ("over eager", "eager_over_fused", "{:.1f}x"),
               ("over compile", "compile_over_fused", "{:.1f}x"), ("of copy", "fused_over_copy", "{:.2f}"))
    lines = ["| pairs | " + " | ".join(f"{dtype}: {name}" for dtype in dtypes for name, _, _ in columns) + " |",
             "|---" * (1 + len(dtypes) * len(columns)) + "|"]
    for shape, pairs in batches:
        cells = [form.format(rows[key][field]) if field in rows.get(key, {}) else "-" for dtype in dtypes
                 for key in [(shape, pairs, dtype)] for _, field, form in columns]
        if set(cells) != {"-"}:
            lines.append(f"| {SHAPE_NAMES[shape]}: {pairs} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", memory_line(list(rows.values()))])


def memory_line(found: Sequence[Row]) -> str:
    """Peak memory of each implementation, from the lowest to the highest of all cases."""
    ranges = []
    for label, name in (("fused loss", "fused"), ("eager", "eager"), ("compile", "compile")):
        values = [row[f"{name}_gradients"] for row in found if f"{name}_gradients" in row]
        if values:
            low, high = f"{min(values):.2f}", f"{max(values):.2f}"
            ranges.append(f"{label} {low}" + f" to {high}" * (high != low))
    return f"Peak memory beyond the inputs, in gradient tensors: {', '.join(ranges) or 'not measured'}."


def target_list(judged: Sequence[Row]) -> str:
    """Each target, met or missed, with the worst case."""
    lines = []
    for target in judged:
        verdict = {True: "met", False: "**missed**", None: "not measured to the end"}[target["met"]]
        worst = f", worst {target['worst']:.2f} at {target['where']}" if "worst" in target else ""
        lines.append(f"- {target['target']}: {verdict}{worst}")
    return "\n".join(lines)
