"""Attention, layout and compilation of the denoisers: the same for policy and reference, which are compared with each other."""

import copy
from collections.abc import Callable, Sequence

import torch

from seppo_fast.compiler import keep_all_graphs, transformer_blocks
from seppo_fast.config import Model
from seppo_fast.errors import UserError, warn_fallback
from seppo_fast.models.attention import choose_attention
from seppo_fast.models.contract import Denoiser
from seppo_fast.models.layout import convolve_in_channels_last


def prepare_denoisers(denoisers: Sequence[Denoiser], settings: Model, latents: tuple[int, ...], dtype: torch.dtype,
                  device: torch.device, say: Callable[[str], None] = print,
                  agree: Callable[[int], int] = lambda index: index) -> None:
    """Set up `denoisers` as `settings` asks, before they are captured or put into an engine.

    `latents` are the sizes that they will see: (h, w), or (F, h, w) of videos. `agree` makes all ranks choose the same attention.
    """
    compiles = settings.compile == "regional" and _compiles(denoisers[0], dtype, device)
    choose_attention(denoisers, settings.attention, latents, dtype, device, say, agree)
    if settings.channels_last:
        for denoiser in denoisers:
            convolve_in_channels_last(denoiser)
    if compiles:
        for denoiser in denoisers:
            for block in transformer_blocks(denoiser):
                block.compile()


def _compiles(denoiser: Denoiser, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a copy of one block compiles, forward and backward. Without this trial, the compiler would fail during an update."""
    keep_all_graphs()
    blocks = transformer_blocks(denoiser)
    if not blocks:
        raise UserError("seppo.model.compile: this model has no transformer blocks to compile; use \"none\"")
    trial = copy.deepcopy(blocks[0]).to(device, dtype).requires_grad_(True)  # a frozen one would have no backward
    latents, prompt = (torch.zeros(1, 8, layer.in_features, device=device, dtype=dtype) for layer in
                       (trial.attn1.to_k, trial.attn2.to_k))
    trial.compile()
    try:
        trial(latents, encoder_hidden_states=prompt).sum().backward()
    except Exception as error:  # whatever the compiler raises
        warn_fallback("seppo.model.compile", error)
        return False
    return True
