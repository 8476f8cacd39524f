"""The README's block on the flipper, from flipper.json."""

import json
from pathlib import Path

from benchmarks.flipper.report import report


def flipper(results: Path) -> str:
    """The block, or the sentence that nothing was measured."""
    path = results / "flipper.json"
    if not path.exists():
        return "Not measured yet (`python -m benchmarks.flipper --out benchmarks/results`, then `make readme`)."
    picture = "![AUC over the noise level, and over the number of noises](results/flipper.png)"
    return "\n\n".join([report(json.loads(path.read_text())).rstrip(), picture])
