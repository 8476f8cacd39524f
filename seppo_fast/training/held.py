"""What this rank's optimizer holds of the weights, whatever the ZeRO stage: tensors, and the pieces that they consist of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from seppo_fast.models.lora import trainable_weights


@dataclass(frozen=True)
class Piece:
    """`count` values of a weight, flattened, from `start` on; `offset` is their place in the tensor that the optimizer holds."""

    name: str
    start: int
    count: int
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """The piece of a tensor that is laid out as the one that the optimizer holds."""
        whole = whole.detach()
        return whole if self.count == whole.numel() else whole.narrow(0, self.offset, self.count)


@dataclass(frozen=True)
class Held:
    """A tensor that the optimizer updates (`master`), its parameter group, and the weights' pieces in it."""

    master: Tensor
    group: int
    pieces: tuple[Piece, ...]


def inner_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer proper, within DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def is_shared_out(engine: DeepSpeedEngine) -> bool:
    """Whether each rank holds a part of the optimizer's tensors; if not, each holds all of them."""
    return engine.optimizer is not inner_optimizer(engine)


def held(engine: DeepSpeedEngine) -> list[Held]:
    """What this rank's optimizer updates."""
    names = {id(weight): name for name, weight in trainable_weights(engine.module).items()}
    optimizer = engine.optimizer
    if engine.zero_optimization_partition_weights():
        both = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return [Held(master, optimizer.sub_group_to_group_id[i], _partitions(weights, names, engine))
                for i, (master, weights) in enumerate(both)]
    if hasattr(optimizer, "bf16_groups"):  # ZeRO-1 in bf16 with gradients summed in fp32
        flat, masters, groups = optimizer.bf16_groups_flat, optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    elif hasattr(optimizer, "bit16_groups"):
        flat, masters, groups = optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
    else:
        return [Held(weight, i, (Piece(names[id(weight)], 0, weight.numel(), 0),))
                for i, group in enumerate(optimizer.param_groups) for weight in group["params"]]
    return [Held(master, i, _cuts(whole, master, weights, names, torch.distributed.get_rank(optimizer.real_dp_process_group[i])))
            for i, (whole, master, weights) in enumerate(zip(flat, masters, groups, strict=True))]


def _partitions(weights: Sequence[Any], names: dict[int, str], engine: DeepSpeedEngine) -> tuple[Piece, ...]:
    """ZeRO-3 cuts each weight into as many parts as there are ranks; the last ones may be short, or empty, and are filled up."""
    pieces, offset = [], 0
    for weight in weights:
        size = weight.partition_numel()
        start = size * engine.optimizer._get_param_partition_rank(weight)
        if (count := min(size, weight.ds_numel - start)) > 0:
            pieces.append(Piece(names[id(weight)], start, count, offset))
        offset += size
    return tuple(pieces)


def _cuts(whole: Tensor, master: Tensor, weights: Sequence[nn.Parameter], names: dict[int, str], rank: int) -> tuple[Piece, ...]:
    """ZeRO-1 and 2 cut one vector of all weights into equal parts.

    Where a weight is in it is read from its storage: the order depends on settings (`round_robin_gradients`), and DeepSpeed's own
    mapping does not heed all of them.
    """
    pieces, first = [], rank * master.numel()
    for weight in weights:
        begin = (weight.data_ptr() - whole.data_ptr()) // weight.element_size()
        left, right = max(begin, first), min(begin + weight.numel(), first + master.numel())
        if left < right:
            assert 0 <= begin <= whole.numel() - weight.numel(), f"{names[id(weight)]} has left DeepSpeed's vector"
            pieces.append(Piece(names[id(weight)], left - begin, right - left, left - first))
    return tuple(pieces)
