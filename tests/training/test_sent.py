"""What ranks send one another in an update: counted, and as the table in seppo_fast/training/README.md says."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from forked import Forks
from outcomes import rows

from seppo_fast.signals import PAUSE

WHAT = {  # by who sends it, in the table's order
    "deepspeed": "the gradients' reduction (DeepSpeed)",
    "Trainer.update_policy": "errors, sign and logit of each pair",
    "Trainer.report": "the seconds of each phase, memory",
    "StopSignals.check": "whether to stop, at the end of an update",
    "Trainer.add_to_pool": "the pool's checksums, when the policy joins it",
}


def test_what_is_sent_is_in_the_table(forks: Forks, settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = settings(**{"seppo.iterations": 3, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "seppo.sampler.steps": 40,
                      "seppo.sampler.batch_size": 4})
    done = forks.run(raw, ranks=2, module="training.counted_job")
    assert done.statuses == [0, 0], done.output[-4000:]
    sent = json.loads((tmp_path / "run" / "sent.json").read_text())
    asked = [draws for _, who, *_, draws in sent if who == "StopSignals.check_now_and_then"]
    passes = 6 * 40 * 2  # updates, steps, batches of a rank
    most = 4 + sum(row["seconds_sampling"] for row in rows(tmp_path / "run")) / PAUSE * 2
    assert 0 < sum(asked) < min(most, passes / 4), (sum(asked), most)
    assert not any(draws for _, who, *_, draws in sent if who != "StopSignals.check_now_and_then")

    found: dict[str, Counter[tuple[str, int]]] = {}
    for update, who, operation, size, _ in sent:
        if update == (2 if who == "Trainer.add_to_pool" else 1):  # the first that ends an iteration, and one that does not
            found.setdefault(who, Counter())[operation, size] += 1
    lines = [f"| {what} | {', '.join(f'{n} {operation}' for operation, n in operations(found[who]).items())} |"
             f" {sum(size * n for (_, size), n in found[who].items())} |" for who, what in WHAT.items()]
    table = (ROOT / "seppo_fast" / "training" / "README.md").read_text()
    assert all(line in table for line in lines), "\n".join(["the table has to be:", *lines])
    saved = [size for update, who, _, size, _ in sent if update == 2 and who not in (*WHAT, "StopSignals.check_now_and_then")]
    assert 0 < len(saved) <= 12 and sum(saved) < 2000, Counter(who for _, who, *_ in sent)  # a checkpoint, as the table says


def operations(sizes: Counter[tuple[str, int]]) -> Counter[str]:
    """How often each operation was called."""
    found: Counter[str] = Counter()
    for (operation, _), number in sizes.items():
        found[operation] += number
    return found


pytestmark = pytest.mark.slow
