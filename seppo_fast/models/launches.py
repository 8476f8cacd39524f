"""Attention over more rows than a kernel can be launched for: a CUDA grid has 65,535 blocks in y and z."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttentionProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MOST = 65_535


class Pieces(TorchFunctionMode):
    """Under this mode, PyTorch's attention of (rows, heads, tokens, channels) runs in launches of at most `most` rows.

    Rows do not see one another, so each gets the same bits as in one launch. Masks are not supported: no UNet here has one.
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
    """Attention by `processor` where one launch is enough, and by PyTorch's kernel in several launches for more rows.

    The limit is on rows times heads: xformers' processor makes one batch of both, PyTorch's kernels put them into y and z.
    The rows of a motion module are the places of all samples' latents; those of other layers are the samples.
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
    """The diffusers processor inside a layer's processor."""
    return processor.processor if isinstance(processor, Launches) else processor


def set_processors(network: nn.Module, kind: type[AttnProcessor2_0] | type[XFormersAttnProcessor] = AttnProcessor2_0) -> None:
    """Give every layer of `network` with PyTorch's attention the processor `kind`, for any number of rows."""
    for layer in network.modules():
        if isinstance(layer, Attention) and isinstance(inner(layer.processor), AttnProcessor2_0):
            layer.set_processor(Launches(kind()))
