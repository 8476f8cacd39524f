"""Finds weights that are not finite when they are loaded. Later, training would blame the learning rate, and caches keep NaN."""

from collections.abc import Iterable

import torch
from torch import Tensor

from seppo_fast.errors import UserError, few


def check_finite(where: object, tensors: Iterable[tuple[str, Tensor]], advice: str) -> None:
    """`UserError` naming the tensors that hold NaN or infinity; `where` is the file they come from."""
    named = {name: tensor for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()}
    # The extremes are NaN where any value is NaN, and need no mask as large as the weights.
    bad = [name for name, tensor in named.items() if not torch.stack(torch.aminmax(tensor.detach())).isfinite().all()]
    if bad:
        halves = {tensor.dtype for tensor in named.values()} == {torch.float16}
        hint = "; values above 65504 do not fit into fp16: use bf16 or fp32, if they are finite in the files" if halves else ""
        raise UserError(f"{where} has weights that are not finite (NaN or infinity): {few(bad)}{hint}. {advice}")
