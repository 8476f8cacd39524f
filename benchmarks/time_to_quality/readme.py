"""The README's blocks on what cheaper rollouts cost, one for each task, from time_to_quality_TASK.json."""

import json
from pathlib import Path

from benchmarks.time_to_quality.report import report


def time_to_quality(results: Path, task: str) -> str:
    """A task's block: its text and picture, or the sentence that it was not measured."""
    path = results / f"time_to_quality_{task}.json"
    if not path.exists():
        return (f"Not measured yet (`python -m benchmarks.time_to_quality --task {task} --out benchmarks/results`, then"
                " `make readme`).")
    picture = f"![quality over FLOPs, a panel for each measure](results/time_to_quality_{task}.png)"
    return "\n\n".join([report(json.loads(path.read_text())).rstrip(), picture])
