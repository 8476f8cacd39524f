"""A micro-batch leaves the host free: values are read when the update is made, not before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seppo_fast.training.trainer import Trainer

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in READS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1}},
                                     {"seppo.reference_score": "rollout"}, {"seppo.method": "sft"}],
                         ids=["fp32", "bf16", "zero 1", "rollout", "sft"])
def test_host_reads_do_not_grow_with_the_micro_batches(changes: dict[str, Any], settings: Any, train: Any, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    update, reads = Trainer.update_policy, {}

    def counted(self: Trainer, number: int) -> Any:
        with HostReads() as mode:
            done = update(self, number)
        reads.setdefault(self.batch.accumulation, []).append(mode.count)
        return done

    monkeypatch.setattr(Trainer, "update_policy", counted)
    for micro in (4, 1):
        train(settings(**changes, **{"train_micro_batch_size_per_gpu": micro, "seppo.iterations": 1,
                                     "seppo.output_dir": str(tmp_path / str(micro))}))
    assert reads[8] == reads[2], "a micro-batch reads from the device"
