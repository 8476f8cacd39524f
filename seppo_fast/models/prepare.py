"""Attention, layout and compilation of the denoisers: the same for policy and reference, which are compared with each other."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from seppo_fast.compiler import keep_all_graphs, transformer_blocks
from seppo_fast.config import Model
from seppo_fast.errors import UserError, warn_fallback
from seppo_fast.models.attention import choose_attention
from seppo_fast.models.contract import Denoiser
from seppo_fast.models.layout import convolve_in_channels_last
from seppo_fast.models.quantize import is_quantized
from seppo_fast.models.trial import Given


def prepare_denoisers(denoisers: Sequence[Denoiser], settings: Model, latents: tuple[int, ...], dtype: torch.dtype,
                      device: torch.device, say: Callable[[str], None] = print,
                      agree: Callable[[int], int] = lambda index: index, *, inputs: Callable[[torch.dtype], dict[str, Given]]
                      ) -> None:
    """Set up `denoisers` as `settings` asks, before they are captured or put into an engine.

    `latents` are the sizes that they will see: (h, w), or (F, h, w) of videos. `agree` makes all ranks choose the same attention.
    `inputs` is what the blocks get that are compiled one by one (`trial.block_inputs`).
    """
    compiles = settings.compile == "regional" and _compiles(denoisers[0], inputs, dtype, device)
    choose_attention(denoisers, settings.attention, latents, dtype, device, say, agree)
    if settings.channels_last:
        for denoiser in denoisers:
            convolve_in_channels_last(denoiser)
    if compiles:
        for denoiser in denoisers:
            for block in transformer_blocks(denoiser):
                block.compile()


def _compiles(denoiser: Denoiser, inputs: Callable[[torch.dtype], dict[str, Given]], dtype: torch.dtype, device: torch.device
              ) -> bool:
    """Whether a copy of a block of each class compiles, forward and backward. Otherwise an update would fail."""
    keep_all_graphs()
    if not transformer_blocks(denoiser):
        raise UserError("seppo.model.compile: this model has no transformer blocks to compile; use \"none\"")
    try:
        for name, (given, named) in inputs(dtype).items():
            trial = copy.deepcopy(denoiser.get_submodule(name)).to(device, dtype)
            for weight in trial.parameters():  # a frozen block would have no backward
                weight.requires_grad_(not is_quantized(weight))
            trial.compile()
            given, named = tree_map_only(Tensor, lambda value: torch.zeros_like(value, device=device), (given, named))
            sum(part.sum() for part in tree_leaves(trial(*given, **named)) if isinstance(part, Tensor)).backward()
    except Exception as error:  # whatever the compiler raises
        warn_fallback("seppo.model.compile", error)
        return False
    return True
