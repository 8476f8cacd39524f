"""What ranks send one another in an update: counted, and as the table in seppo_fast/training/README.md says."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forks


def test_print(forks: Forks, settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = settings(**{"seppo.iterations": 3, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "seppo.sampler.steps": 40,
                      "seppo.sampler.batch_size": 4})
    done = forks.run(raw, ranks=2, module="training.counted_job")
    assert done.statuses == [0, 0], done.output[-4000:]
    sent = json.loads((tmp_path / "run" / "sent.json").read_text())
    for (update, who, op, size, draws), n in Counter(tuple(x) for x in sent).items():
        print(update, who, op, size, draws, n)
