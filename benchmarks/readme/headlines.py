"""The front page's lines: one for each table of benchmarks/README.md, from the same result files."""

import json
from pathlib import Path

from benchmarks.ablation.report import BASE, MAIN, MEASURES, Result, above, points
from benchmarks.flipper.report import headline as flipper
from benchmarks.improvement.report import headline as improvement
from benchmarks.intervals import interval
from benchmarks.result_files import Row


def headlines(results: Path) -> str:
    """A line for each result file that is there."""
    lines = [headline(json.loads((results / file).read_text())) for file, headline in HEADLINES.items()
             if (results / file).exists()]
    return "\n".join(f"- {line}" for line in lines)


def loss(result: Row) -> str:
    def over(name: str) -> str:
        ratios = [row[f"{name}_over_fused"] for row in result["ratios"]
                  if row["what"] == "forward_backward" and f"{name}_over_fused" in row]
        return f"{min(ratios):.1f} to {max(ratios):.1f}"

    return (f"Loss, forward and backward, {result['machine']['cpu']}: {over('eager')} times as fast as eager PyTorch and"
            f" {over('compile')} times as fast as `torch.compile`.")


def throughput(result: Row) -> str:
    loop, ranks = result["loop"], result["ranks"]
    return (f"Training, quickstart, {result['machine']['cpu']}: {loop['ours_over_obvious']:.1f} times as fast as a trainer that"
            f" calls the pipeline for each prompt, {loop['ours_over_obvious_batched']:.1f} times as fast as one that calls it for"
            f" each batch; two ranks on two cores {ranks['two_over_one']:.2f} times as fast as one on one.")


def decoding(result: Row) -> str:
    ratios = [row["dali_over_pyav"] for row in result["rows"] if "dali_over_pyav" in row]
    return f"Videos, {result['machine']['cpu']}: DALI's CPU decoder {min(ratios):.2f} to {max(ratios):.2f} times as fast as PyAV."


def ablation(result: Result) -> str:
    def over(other: str) -> str:
        return ", ".join(f"{label} {points(interval(above(MAIN, other)(result, measure)))}" for measure, label in MEASURES.items())

    flow = " with a flow (a tiny Stable Diffusion 3)" if result["settings"].get("model") == "flow" else ""
    return (f"Ablation on digits{flow}, {result['settings']['seeds']} seeds, in points with 95 % intervals: SePPO over its base:"
            f" {over(BASE)}; over SFT: {over('sft')}. Much of the paper's order does not show on this toy.")


HEADLINES = {"loss_cpu.json": loss, "throughput_cpu.json": throughput, "video_cpu.json": decoding, "ablation.json": ablation,
             "ablation_flow.json": ablation, "flipper.json": flipper, "improvement.json": improvement}
