"""Changes of the network for the sampling loop alone: compiled blocks and fused projections.

Both round differently from the plain network. The training step compares policy and reference, which are equal when an
iteration starts, so they must run the same network there. The changes are made before the loop and undone after it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from seppo_fast.compiler import keep_all_graphs, transformer_blocks
from seppo_fast.errors import UserError
from seppo_fast.models.launches import Launches, inner

Change = tuple[nn.Module, str, object]
MISSING = object()


@contextmanager
def changed(changes: list[Change]) -> Iterator[None]:
    """Set these attributes of these modules, and put back what was there when the block is left."""
    before = [(module, name, vars(module).get(name, MISSING)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            if value is MISSING:
                vars(module).pop(name, None)
            else:
                setattr(module, name, value)


def compiled_blocks(module: nn.Module) -> list[Change]:
    """The transformer blocks, compiled one by one."""
    blocks = transformer_blocks(module)
    if not blocks:
        raise UserError("seppo.sampler.compile: this model has no transformer blocks to compile; use \"full\" or \"none\"")
    keep_all_graphs()
    return [(block, "forward", torch.compile(block.forward, dynamic=False)) for block in blocks]


def fused_projections(module: nn.Module) -> tuple[list[Change], Callable[[], None]]:
    """Query, key and value (or key and value) as one matrix product; and a function that copies the weights again.

    The fused weights are frozen copies, which no policy in the pool has: refresh them before each batch.
    """
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    if any(isinstance(part, BaseTunerLayer) for part in module.modules()):
        raise UserError("seppo.sampler.fuse_projections: does not go with seppo.model.lora, whose adapters sit on the"
                        " projections that would be fused; set it to false")
    others = sorted({type(inner(part.processor)).__name__ for part in attentions} - {AttnProcessor2_0.__name__})
    if others or not attentions:
        raise UserError(f"seppo.sampler.fuse_projections: needs seppo.model.attention \"sdpa\", this model's attention is"
                        f" {', '.join(others) or 'none'}; set one or the other")
    with torch.no_grad():
        for attention in attentions:
            attention.fuse_projections()
    pairs = [_fused(attention) for attention in attentions]
    for fused, _ in pairs:
        fused.requires_grad_(False)

    @torch.no_grad()
    def refresh() -> None:
        for fused, parts in pairs:
            torch.cat([part.weight for part in parts], out=fused.weight)
            if fused.bias is not None:
                torch.cat([part.bias for part in parts], out=fused.bias)

    processor = Launches(FusedAttnProcessor2_0())
    return [(attention, "processor", processor) for attention in attentions], refresh


def _fused(attention: Attention) -> tuple[nn.Linear, list[nn.Linear]]:
    if attention.is_cross_attention:
        return attention.to_kv, [attention.to_k, attention.to_v]
    return attention.to_qkv, [attention.to_q, attention.to_k, attention.to_v]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The whole network as one compiled function, compiled for each shape that it is called with."""
    keep_all_graphs()
    return torch.compile(function, dynamic=False)


class Cache:
    """Counts how many compiled graphs came from the compiler's cache on disk since this object was made."""

    def __init__(self) -> None:
        self._before = self._counts()

    def __str__(self) -> str:
        found, made = (now - before for now, before in zip(self._counts(), self._before, strict=True))
        return f"{found} of {found + made} graphs from the cache"

    @staticmethod
    def _counts() -> tuple[int, int]:
        counts = torch._dynamo.utils.counters["aot_autograd"]
        return counts["autograd_cache_hit"], counts["autograd_cache_miss"] + counts["autograd_cache_bypass"]
