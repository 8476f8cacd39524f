"""The README's blocks on the quickstarts, from their result.json files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def quickstart(results: Path) -> str:
    """Before and after, from the quickstart's result.json, with its picture, as the front page shows them."""
    return before_and_after(json.loads((results / "quickstart" / "result.json").read_text()), "benchmarks/results/quickstart",
                            "make quickstart")


RATES = {"aaf_rate": "AAF rate (share of sign -1, App. B.2)", "implicit_acc": "implicit accuracy (share of logit > 0)"}
CHOSEN = {"beta": "beta, which is chosen by \"auto\"", "abs_logit_p50": "median of abs(logit), for which \"auto\" aims at 1.39"}


def flow(results: Path) -> str:
    """Before and after of the quickstart with a flow, or the sentence that it was not run."""
    path = results / "quickstart_flow" / "result.json"
    if not path.exists():
        return "Not measured yet (`make quickstart-flow`, then `make readme`)."
    result = json.loads(path.read_text())
    return "\n".join([before_and_after(result, "results/quickstart_flow", "make quickstart-flow", RATES | CHOSEN), "",
                      in_time(result["seconds"]["total"])])


def before_and_after(result: dict[str, Any], folder: str, command: str, rates: Mapping[str, str] = RATES) -> str:
    """Picture, scores and `rates` (key -> label) of one run of the quickstart; `folder` has the picture, as the page names it."""
    base, after = result["base"], result["seppo"]
    first, last = result["first_iteration"], result["last_iteration"]
    lines = [
        f"![samples of the base model and, from the same noise, after SePPO]({folder}/side_by_side.png)",
        "",
        "| | base | SePPO | change |",
        "|---|---|---|---|",
        *(f"| {label} | {base[key]:.1%} | {after[key]:.1%} | {100 * (after[key] - base[key]):+.1f} points |"
          for key, label in (("prompt_accuracy", "prompt accuracy"), ("cleanliness", "cleanliness"))),
        "",
        "| | first iteration | last iteration |",
        "|---|---|---|",
        *(f"| {label} | {first[key]:.2f} | {last[key]:.2f} |" for key, label in rates.items()),
        "",
        f"Measured by `{command}` with seed {result['settings']['seed']} on {result['machine']['cpu']},"
        f" {result['machine']['cores']} cores, {result['machine']['threads']} thread{'s' * (result['machine']['threads'] > 1)}:"
        f" {result['seconds']['total']:.0f} s, with the training of the base model, without the installation. Prompt accuracy:"
        f" share of {base['samples']} samples that an independent classifier reads as the prompt's digit. Cleanliness: share of"
        " samples as close to a held-out real digit as 95% of the real digits are.",
    ]
    return "\n".join(lines)


SECONDS = 480  # the time limit of all quickstarts but the first


def video(results: Path, name: str = "quickstart_video") -> str:
    """Before and after, from a video quickstart's result.json, with its clips, or the sentence that it was not run."""
    path, command = results / name / "result.json", "make " + name.replace("_", "-")
    if not path.exists():
        return f"Not measured yet (`{command}`, then `make readme`)."
    result = json.loads(path.read_text())
    base, after, clean, machine = result["base"], result["seppo"], result["judge"]["clean_clips"], result["machine"]
    measures = (("direction_accuracy", "direction accuracy", "{:.1%}"), ("moving", "moving", "{:.1%}"),
                ("frechet_distance", "Frechet distance (less is better)", "{:.2f}"), ("ssim", "SSIM", "{:.3f}"),
                ("psnr", "PSNR", "{:.2f} dB"))
    lines = [
        f"![clips of the base model and, from the same noise, after SePPO](results/{name}/side_by_side.webp)",
        "",
        "| | base | SePPO | clean clips |",
        "|---|---|---|---|",
        *(f"| {label} | " + " | ".join(form.format(scores[key]) for scores in (base, after, clean)) + " |"
          for key, label, form in measures),
        "",
        f"Measured by `{command}` with seed {result['settings']['seed']} on {machine['cpu']}, {machine['cores']} cores,"
        f" {machine['threads']} thread{'s' * (machine['threads'] > 1)}: {result['seconds']['total']:.0f} s, with the training of"
        f" the base model, without the installation. Direction accuracy: share of {base['samples']} samples whose brightness moves"
        f" in the prompt's direction ({result['judge']['accuracy_on_held_out_clips']:.1%} for real clips). Frechet distance: to"
        f" clips of held-out digits, in {result['judge']['features']} random projections of small frames and of their differences."
        " SSIM and PSNR: to the held-out clip of the same prompt that is nearest. Clean clips: the same measures of real clips.",
        "",
        in_time(result["seconds"]["total"]),
    ]
    return "\n".join(lines)


def in_time(seconds: float) -> str:
    """Whether a quickstart kept to its time."""
    return f"- at most {SECONDS} s on 2 cores: " + ("met" if seconds <= SECONDS else f"**missed**, {seconds:.0f} s")


def improvement(results: Path) -> str:
    """Base, improved and iterated, from the improvement quickstart's result.json; in words where it was not run."""
    path = results / "quickstart_improvement" / "result.json"
    if not path.exists():
        return "Not measured yet (`make quickstart-improvement`, then `make readme`)."
    result = json.loads(path.read_text())
    scores, machine, seconds = result["scores"], result["machine"], result["seconds"]
    measures = (("level", "level", "{:.2f}"), ("prompt_accuracy", "prompt accuracy", "{:.1%}"), ("distance", "distance", "{:.2f}"),
                ("vendi", "Vendi", "{:.2f}"))
    folder = "results/quickstart_improvement"
    lines = [
        f"![samples of the base model and, from the same noise, after iterative DPO]({folder}/side_by_side.png)",
        "",
        f"![losers, what the improvement model makes of them, and the data's winners]({folder}/improved.png)",
        "",
        "| | " + " | ".join(label for _, label, _ in measures) + " |",
        "|---" * (1 + len(measures)) + "|",
        *(f"| {name} | " + " | ".join(form.format(found[key]) for key, _, form in measures) + " |"
          for name, found in scores.items()),
        "",
        f"Measured by `make quickstart-improvement` with seed {result['settings']['seed']} on {machine['cpu']},"
        f" {machine['cores']} cores, {machine['threads']} thread{'s' * (machine['threads'] > 1)}: {seconds['total']:.0f} s"
        f" without the installation: {seconds['base']:.0f} s for the base model, {seconds['improvement']:.0f} s for stage one,"
        f" {seconds['iterative_dpo']:.0f} s for stage two, the rest for the judgement. {scores['base']['samples']} samples. Level:"
        " the degradation that a regressor reads in a sample; 0 is a clean digit, 1 is hardly visible. Prompt accuracy: the share"
        " that a classifier reads as the prompt's digit. Distance: to the nearest held-out digit; less is better. Vendi: the"
        " diversity within a prompt, of restored samples. The settings were chosen on this seed and one other.",
        "",
        in_time(seconds["total"]),
    ]
    return "\n".join(lines)
