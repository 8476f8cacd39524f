"""What makes the sampler quicker leaves what it draws, and so what is trained, the same but for rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import Forks
from outcomes import apart, weights

STEADY = {"optimizer.params.eps": 1e-5, "seppo.beta": 300.0}  # see test_speed_keys.py


def test_the_same_model(trained: Callable[..., Path]) -> None:
    changes = {"seppo.sampler.batch_size": "auto", "seppo.sampler.fuse_projections": True}
    assert apart(weights(trained(**STEADY)), weights(trained(**STEADY, **changes))) < 2e-5


def test_ranks_agree_on_the_batch_size(settings: Callable[..., dict[str, Any]], forks: Forks) -> None:
    """Each step asks all ranks for signals: with other batches on each they would wait for one another."""
    raw = settings(**{"seppo.sampler.batch_size": "auto", "seppo.samples.every": 1, "seppo.samples.prompts": ["a handwritten one"]})
    done = forks.run(raw, ranks=2, timeout=100)
    assert done.statuses == [0, 0], done.output[-3000:]
    assert done.output.count("sampler: batches of ") == 1
