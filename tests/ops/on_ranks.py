"""On every rank: the gradient of the loss of this rank's pairs under DDP, to `RANK.pt` in the folder of `--config FILE`."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from seppo_fast.ops import seppo_loss


def make(shape=(4, 4, 8, 8), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(shape, generator=g)
    ref = target + 0.3 * torch.randn(shape, generator=g)
    model = ref + 0.02 * torch.randn(shape, generator=g)
    return model.to(dtype).requires_grad_(), ref.to(dtype), target.to(dtype)


def main() -> int:
    [folder] = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    layer = nn.parallel.DistributedDataParallel(nn.Linear(12, 12))
    noisy, ref, target = (x.detach() for x in make((4, 12), seed=rank))
    for _ in range(2):
        seppo_loss(layer(noisy), ref, target, 50.0).backward()
    torch.save(layer.module.weight.grad, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    return 0
