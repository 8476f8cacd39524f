"""Ranks on GPUs: they meet, and NCCL connects them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, free_port, unranked

PROGRAM = """
import torch, torch.distributed as dist
from seppo_fast.ranks import join, leave
ranks = join()
total = torch.full((3,), ranks.rank + 1.0, device=ranks.device)
dist.all_reduce(total)
print(f"rank {ranks.rank} on {ranks.device}: {total.tolist()}, {ranks.largest(ranks.rank)}, {dist.get_backend()}", flush=True)
leave()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_two_gpus(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run([*launcher, str(tmp_path / "program.py")], cwd=ROOT, text=True, capture_output=True, timeout=120,
                          env=unranked() | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert f"rank {rank} on cuda:{rank}: [3.0, 3.0, 3.0], 1, nccl" in done.stdout
