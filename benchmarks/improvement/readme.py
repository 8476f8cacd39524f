"""The README's block on the second paper's toy, from improvement.json."""

import json
from pathlib import Path

from benchmarks.improvement.report import report


def improvement(results: Path) -> str:
    """The README's block; in words where it was not run."""
    path = results / "improvement.json"
    if not path.exists():
        return "Not measured yet (`python -m benchmarks.improvement --out benchmarks/results`, then `make readme`)."
    picture = "![level, distance and Vendi over the iterations](results/improvement.png)"
    return "\n\n".join([report(json.loads(path.read_text())).rstrip(), picture])
