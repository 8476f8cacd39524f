"""The README's block on the second paper's toy, from improvement.json and improvement_shares/."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.improvement.report import APPLIED, IMPROVEMENT, MEASURES, TIMES, Result, report, runs_of, scores, written
from benchmarks.intervals import Interval


def improvement(results: Path) -> str:
    """The README's block; in words where it was not run."""
    path = results / "improvement.json"
    if not path.exists():
        return "Not measured yet (`python -m benchmarks.improvement --out benchmarks/results`, then `make readme`)."
    picture = "![level, distance and Vendi over the iterations](results/improvement.png)"
    result = json.loads(path.read_text())
    others = [json.loads(other.read_text()) for other in sorted((results / "improvement_shares").glob("*.json"))]
    return "\n\n".join([report(result).rstrip(), picture, *([shares(result, others)] if others else [])])


def shares(result: Result, others: Sequence[Result]) -> str:
    """What the improvement model does with other shares of its tasks, on the seeds that all results have."""
    everyone = [*others, result]
    seeds = set.intersection(*({run["seed"] for run in runs_of(each, IMPROVEMENT)} for each in everyone))
    lines = ["| improve, reconstruct, unconditional | base's samples, improved | "
             + " | ".join(measure.label for measure in MEASURES.values()) + " |", "|---" * (2 + len(MEASURES)) + "|"]
    for each in sorted(everyone, key=lambda each: each["settings"]["improve_share"]):
        settings, kept = each["settings"], {"runs": [run for run in each["runs"] if run["seed"] in seeds]}
        first, second = settings["improve_share"], settings["reconstruct_share"]
        for index in range(APPLIED):
            cells = (written(Interval(mean(scores(kept, IMPROVEMENT, name, index)), None), measure)
                     for name, measure in MEASURES.items())
            lines.append(f"| {first:g}, {second:g}, {1 - first - second:.2g} | {TIMES[index]} | " + " | ".join(cells) + " |")
    named = ", ".join(map(str, sorted(seeds)))
    return (f"Other shares of the improvement model's tasks (means over seeds {named}; everything else is the same):\n\n"
            + "\n".join(lines))
