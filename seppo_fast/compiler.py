"""What the process asks of PyTorch's compiler."""

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

GRAPHS = 64  # of one function; PyTorch's own limit is 8


def keep_all_graphs() -> None:
    """Let every width, batch and mode of a block have its graph: beyond the limit PyTorch would run it uncompiled.

    All blocks of a class share one `forward`, and so one limit, whoever compiles them.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)


def transformer_blocks(module: nn.Module) -> list[BasicTransformerBlock]:
    """What is compiled block by block: what diffusers' `compile_repeated_blocks` takes, which knows no UNetMotionModel."""
    return [part for part in module.modules() if isinstance(part, BasicTransformerBlock)]
