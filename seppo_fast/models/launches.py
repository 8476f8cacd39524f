"""Attention over more rows than a kernel can be launched for: a CUDA grid has 65,535 blocks in y and z."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttentionProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MOST = 65_535


class Pieces(TorchFunctionMode):
    """PyTorch's attention under it, of (rows, heads, tokens, channels), is made in launches of at most `most` rows.

    A row sees no other: each gets the very bits that one launch would give. No mask: no model here has one.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        parts = zip(*(tensor.split(self.most) for tensor in args), strict=True)
        return torch.cat([func(*part, **(kwargs or {})) for part in parts])


class Launches:
    """Attention by `processor` as far as one launch goes, and by PyTorch's kernel in several for more rows.

    Rows times heads are what is limited: xformers' processor makes one batch of both, PyTorch's kernels have them in y and z.
    A motion module's rows are the places of all samples' latents, an image's are the samples.
    """

    def __init__(self, processor: AttentionProcessor, most: int = MOST) -> None:
        self.processor, self.most = processor, most
        self.in_pieces = AttnProcessor2_0() if isinstance(processor, XFormersAttnProcessor) else processor

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, **given: Any) -> Tensor:
        rows = max(1, self.most // attn.heads)
        if len(hidden_states) <= rows:
            return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, **given)
        with Pieces(rows):
            return self.in_pieces(attn, hidden_states, encoder_hidden_states, attention_mask, **given)


def inner(processor: Any) -> AttentionProcessor:
    """The processor of diffusers' in a layer's."""
    return processor.processor if isinstance(processor, Launches) else processor


def set_processors(network: nn.Module, kind: type[AttnProcessor2_0] | type[XFormersAttnProcessor] = AttnProcessor2_0) -> None:
    """Every layer of `network` that has PyTorch's attention gets `kind`, for any number of rows."""
    for layer in network.modules():
        if isinstance(layer, Attention) and isinstance(inner(layer.processor), AttnProcessor2_0):
            layer.set_processor(Launches(kind()))
