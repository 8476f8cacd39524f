"""PyTorch's compiler: its limit on graphs in this process, and which blocks it compiles."""

import torch
from torch import nn

GRAPHS = 64  # of one function; PyTorch's own limit is 8
# Of UNetMotionModel and of SD3Transformer2DModel, which do not say which blocks they repeat.
BLOCKS = {"BasicTransformerBlock", "JointTransformerBlock"}


def keep_all_graphs() -> None:
    """Raise the limit on compiled graphs, so that each width, batch size and mode of a block has its own.

    Above the limit PyTorch runs a block uncompiled. All blocks of a class share one `forward`, and so one limit.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)


def transformer_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks to compile one by one, as in diffusers' `compile_repeated_blocks`."""
    names = BLOCKS.union(getattr(module, "_repeated_blocks", None) or ())
    return [part for part in module.modules() if type(part).__name__ in names]
