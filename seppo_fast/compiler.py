"""What the process asks of PyTorch's compiler."""

import torch

GRAPHS = 64  # of one function; PyTorch's own limit is 8


def keep_all_graphs() -> None:
    """Let every width, batch and mode of a block have its graph: beyond the limit PyTorch would run it uncompiled.

    All blocks of a class share one `forward`, and so one limit, whoever compiles them.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
