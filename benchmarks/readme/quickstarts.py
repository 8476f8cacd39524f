"""The README's blocks on the two quickstarts, from their result.json files."""

import json
from pathlib import Path


def quickstart(results: Path) -> str:
    """Before and after, from the quickstart's result.json, with its picture."""
    result = json.loads((results / "quickstart" / "result.json").read_text())
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
        f" {result['seconds']['total']:.0f} s, with the training of the base model, without the installation. Prompt accuracy:"
        f" share of {base['samples']} samples that an independent classifier reads as the prompt's digit. Cleanliness: share of"
        " samples as close to a held-out real digit as 95% of the real digits are.",
    ]
    return "\n".join(lines)


VIDEO_SECONDS = 480  # the video quickstart's time limit


def video(results: Path) -> str:
    """Before and after, from the video quickstart's result.json, with its clips, or the sentence that it was not run."""
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
        f" {machine['threads']} thread{'s' * (machine['threads'] > 1)}: {result['seconds']['total']:.0f} s, with the training of"
        f" the base model, without the installation. Direction accuracy: share of {base['samples']} samples whose brightness moves"
        f" in the prompt's direction ({result['judge']['accuracy_on_held_out_clips']:.1%} for real clips). Frechet distance: to"
        f" clips of held-out digits, in {result['judge']['features']} random projections of small frames and of their differences."
        " SSIM and PSNR: to the held-out clip of the same prompt that is nearest. Clean clips: the same measures of real clips.",
        "",
        f"- at most {VIDEO_SECONDS} s on 2 cores: "
        + ("met" if result["seconds"]["total"] <= VIDEO_SECONDS else f"**missed**, {result['seconds']['total']:.0f} s"),
    ]
    return "\n".join(lines)
