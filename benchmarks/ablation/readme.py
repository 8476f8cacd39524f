"""The README's block on the ablation, from ablation.json and the runs with other settings."""

import json
from pathlib import Path

from benchmarks.ablation.report import Result, report, table


def ablation(results: Path) -> str:
    """The block: the runs, then those with other settings, or the sentence that nothing was measured."""
    path = results / "ablation.json"
    if not path.exists():
        return "Not measured yet (`python -m benchmarks.ablation --out benchmarks/results`, then `make readme`)."
    result = json.loads(path.read_text())
    pictures = [f"![{text}](results/ablation_{name}.png)" for name, text in (
        ("figure2", "prompt accuracy and cleanliness over updates for each choice of the reference, as in Figure 2"),
        ("figure3", "AAF rate and accuracy over updates, and SFT against SePPO, as in Figure 3"))]
    others = [json.loads(file.read_text()) for file in sorted(results.glob("ablation_*/ablation.json"))]
    return "\n\n".join([report(result).rstrip(), *pictures, *(beside(result, other) for other in others)])


def ablation_flow(results: Path) -> str:
    """The block on the main rows with a flow, or the sentence that they were not measured."""
    path = results / "ablation_flow.json"
    if not path.exists():
        return ("Not measured yet (`python -m benchmarks.ablation --model flow --seeds 3 --out benchmarks/results`, then"
                " `make readme`).")
    return report(json.loads(path.read_text())).rstrip()


def beside(result: Result, other: Result) -> str:
    """The table of runs with other settings, and what these are."""
    changed = {key: value for key, value in other["settings"].items() if result["settings"].get(key) != value and key != "seeds"}
    seeds = other["settings"]["seeds"]
    heading = ", ".join(f"{key} {value:g} instead of {result['settings'][key]:g}" for key, value in changed.items())
    return f"The same with {heading}, {seeds} seed{'s' * (seeds > 1)}:\n\n{table(other)}"
