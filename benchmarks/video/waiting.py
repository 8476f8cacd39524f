"""How long a run waited for its data."""

import json
from pathlib import Path


def waiting_share(run: Path, warm_up: int = 0) -> float:
    """The share of a run's seconds (sampling, training, data) that its trainer waited for data, from `metrics.jsonl`.

    The first `warm_up` updates are left out.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][warm_up:]
    totals = {name: sum(row[f"seconds_{name}"] or 0.0 for row in rows) for name in ("sampling", "training", "data")}
    return totals["data"] / sum(totals.values())
