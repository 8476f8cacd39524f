"""`python -m benchmarks.readme [--check]`: the tables of the pages, generated from benchmarks/results/ and config.py."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.ablation_report import ablation
from benchmarks.config_keys import keys
from benchmarks.headlines import headlines
from benchmarks.loss_summary import Row, of_gpu_suite, targets
from benchmarks.throughput_readme import throughput
from benchmarks.video_readme import video as decoding

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BENCHMARKS = ROOT / "benchmarks" / "README.md"
CONFIGS = ROOT / "seppo_fast" / "configs" / "README.md"
PAGES = (README, BENCHMARKS, CONFIGS)
RESULTS = ROOT / "benchmarks" / "results"


def main(argv: list[str] | None = None) -> int:
    """Write the tables into the pages, or with --check say whether they are what the result files give (exit status 1: not)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 when a page is out of date")
    check = parser.parse_args(argv).check
    for page in PAGES:
        text = page.read_text()
        fresh = filled(text)
        if check and fresh != text:
            return 1
        page.write_text(fresh)
    return 0


def filled(text: str) -> str:
    """`text` with what stands between its `<!-- name -->` and `<!-- /name -->` replaced by the table of that name."""
    tables = {"quickstart": quickstart, "headlines": partial(headlines, RESULTS), "quickstart_video": video, "loss": loss,
              "throughput": partial(throughput, RESULTS), "decoding": partial(decoding, RESULTS),
              "ablation": partial(ablation, RESULTS), "keys": keys}
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, make=table: found[1] + make() + "\n" + found[2], text)
    return text


def quickstart() -> str:
    """Before and after, from the quickstart's result.json, with its picture."""
    result = json.loads((RESULTS / "quickstart" / "result.json").read_text())
    base, after = result["base"], result["seppo"]
    first, last = result["first_iteration"], result["last_iteration"]
    lines = [
        "![samples of the base model and, from the same noise, after SePPO](benchmarks/results/quickstart/side_by_side.png)",
        "",
        "| | base | SePPO | change |",
        "|---|---|---|---|",
        *(f"| {label} | {base[key]:.1%} | {after[key]:.1%} | {100 * (after[key] - base[key]):+.1f} points |"
          for key, label in (("prompt_accuracy", "prompt accuracy"), ("cleanliness", "cleanliness"))),
        "",
        "| | first iteration | last iteration |",
        "|---|---|---|",
        *(f"| {label} | {first[key]:.2f} | {last[key]:.2f} |"
          for key, label in (("aaf_rate", "AAF rate (share of sign -1, App. B.2)"),
                             ("implicit_acc", "implicit accuracy (share of logit > 0)"))),
        "",
        f"Measured by `make quickstart` with seed {result['settings']['seed']} on {result['machine']['cpu']},"
        f" {result['machine']['cores']} cores, {result['machine']['threads']} thread{'s' * (result['machine']['threads'] > 1)}:"
        f" {result['seconds']['total']:.0f} s in all, base model included, installation apart. Prompt accuracy: share of"
        f" {base['samples']} samples that an independent classifier reads as the prompt's digit. Cleanliness: share of samples as"
        " close to a held-out real digit as 95% of the real digits are.",
    ]
    return "\n".join(lines)


VIDEO_SECONDS = 480  # what the video quickstart is to take


def video(results: Path = RESULTS) -> str:
    """Before and after, from the video quickstart's result.json, with its loop; in words where it was not run."""
    path = results / "quickstart_video" / "result.json"
    if not path.exists():
        return "Not measured yet (`make quickstart-video`, then `make readme`)."
    result = json.loads(path.read_text())
    base, after, clean, machine = result["base"], result["seppo"], result["judge"]["clean_clips"], result["machine"]
    measures = (("direction_accuracy", "direction accuracy", "{:.1%}"), ("moving", "moving", "{:.1%}"),
                ("frechet_distance", "Frechet distance (less is better)", "{:.2f}"), ("ssim", "SSIM", "{:.3f}"),
                ("psnr", "PSNR", "{:.2f} dB"))
    lines = [
        "![clips of the base model and, from the same noise, after SePPO](results/quickstart_video/side_by_side.webp)",
        "",
        "| | base | SePPO | clean clips |",
        "|---|---|---|---|",
        *(f"| {label} | " + " | ".join(form.format(scores[key]) for scores in (base, after, clean)) + " |"
          for key, label, form in measures),
        "",
        f"Measured by `make quickstart-video` with seed {result['settings']['seed']} on {machine['cpu']}, {machine['cores']} cores,"
        f" {machine['threads']} thread{'s' * (machine['threads'] > 1)}: {result['seconds']['total']:.0f} s in all, base model"
        f" included, installation apart. Direction accuracy: share of {base['samples']} samples whose brightness travels in the"
        f" prompt's direction (right for {result['judge']['accuracy_on_held_out_clips']:.1%} of real clips). Frechet distance: to"
        f" clips of held-out digits, on {result['judge']['features']} random projections of small frames and of their differences."
        " SSIM and PSNR: to the held-out clip of the same prompt that is nearest. Clean clips: the same measures of real clips.",
        "",
        f"- at most {VIDEO_SECONDS} s on 2 cores: "
        + ("met" if result["seconds"]["total"] <= VIDEO_SECONDS else f"**missed**, {result['seconds']['total']:.0f} s"),
    ]
    return "\n".join(lines)


SHAPE_NAMES = {"sd15": "SD-1.5, 512x512", "sdxl": "SDXL, 1024x1024", "video": "video, 16 x 256x256",
               "sd3_1024": "SD3-like, 1024x1024"}


def loss(results: Path = RESULTS) -> str:
    """Figures of the fused loss from loss_cpu.json and, where there is one, the GPU suite's; in words where there is none."""
    return "\n\n".join([loss_on_cpu(results / "loss_cpu.json"), *map(loss_on_gpu, sorted(results.glob("gpu_suite*.json")))])


def loss_on_cpu(path: Path) -> str:
    if not path.exists():
        return "On the CPU: not measured yet (`python -m benchmarks.loss --out benchmarks/results`, then `make readme`)."
    result = json.loads(path.read_text())
    machine, versions = result["machine"], result["versions"]
    load = f"{machine['load_average_at_start']} to {machine['load_average_at_end']}"
    said = [f"Forward + backward on {machine['cpu']}, {machine['threads']} of {machine['cores']} cores, torch {versions['torch']},"
            f" commit `{result['commit']}`, load average {load}; inputs rotate through {result['settings']['rotate_mb']} MB."
            " Plots: [ratios](results/loss_cpu_ratio.png), [bandwidth](results/loss_cpu_bandwidth.png);"
            " figures: [JSON](results/loss_cpu.json), [CSV](results/loss_cpu.csv).",
            ratio_table(result["ratios"]), target_list(result["targets"])]
    return "\n\n".join(said)


def loss_on_gpu(path: Path) -> str:
    suite = json.loads(path.read_text())
    machine, found = suite["machine"], of_gpu_suite(suite)
    said = [f"Forward + backward on {machine['gpu']}, torch {machine['torch']}, driver {machine['driver']}, commit"
            f" `{suite['commit']}`: time of a call with the host's in it; in units of the copy, time on the device."
            f" [All figures](results/{path.name}).", ratio_table(found), target_list(targets(found, "cuda"))]
    return "\n\n".join(said)


def ratio_table(found: Sequence[Row]) -> str:
    """One line a batch, the same columns for each dtype; and one line on memory."""
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
    """The range over all cases, of each implementation."""
    said = []
    for label, name in (("fused loss", "fused"), ("eager", "eager"), ("compile", "compile")):
        values = [row[f"{name}_gradients"] for row in found if f"{name}_gradients" in row]
        if values:
            low, high = f"{min(values):.2f}", f"{max(values):.2f}"
            said.append(f"{label} {low}" + f" to {high}" * (high != low))
    return f"Peak memory beyond the inputs, in gradient tensors: {', '.join(said) or 'not measured'}."


def target_list(judged: Sequence[Row]) -> str:
    """Each target, met or missed, with the worst case."""
    lines = []
    for target in judged:
        verdict = {True: "met", False: "**missed**", None: "not measured to the end"}[target["met"]]
        worst = f", worst {target['worst']:.2f} at {target['where']}" if "worst" in target else ""
        lines.append(f"- {target['target']}: {verdict}{worst}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
