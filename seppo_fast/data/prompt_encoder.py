"""Prompt embeddings without a cache on disk: the text encoder rests in host memory, and embeds a window's prompts at once."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from math import prod
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from seppo_fast import config
from seppo_fast.data.memory import give_back_memory
from seppo_fast.errors import UserError
from seppo_fast.models import Conditions
from seppo_fast.models.engines import same_with_gradients
from seppo_fast.models.quantize import is_quantized
from seppo_fast.models.tokens import token_counter

# Pick-a-Pic's 58,960 prompts are 7 GB of Stable Diffusion's embeddings and 19 GB of SDXL's, and 161 GB of those of SD3.5's T5.
LARGEST_CACHE = 64 * 10**9  # bytes that "auto" keeps on disk; no share of the free space: ranks may see different values of it
WINDOW = 10**9  # bytes of embeddings that a rank holds; more would delay a stop, which waits until they are made
COUNTED_AT_ONCE = 1000  # prompts whose tokens are counted in one call


class PromptEncoder:
    """The embeddings of `texts` by their numbers, to the bit those of the cache. Only the main thread may `hold` prompts.

    It is on the device while it embeds, in the memory that the training's activations take at other times.
    """

    def __init__(self, model: Any, texts: pa.Array, data: config.Data, device: str | torch.device) -> None:
        self.model, self.texts, self.cache_dtype, self.device = model, texts, data.cache_dtype, device
        self.window = max(1, WINDOW // prompt_bytes(model, data))
        self.encoders: list[nn.Module] = []
        self.on_host: list[tuple[nn.Parameter, Tensor]] = []
        self.embed = model.load_text(device, adapt=self._note)
        self.held: dict[int, Conditions] = {}
        self.hold([])

    def _note(self, _: str, encoder: nn.Module) -> None:
        """Keep a text encoder, which is in host memory still."""
        self.encoders.append(encoder)
        self.on_host += [(parameter, parameter.data) for parameter in encoder.parameters() if not is_quantized(parameter)]

    def __call__(self, prompts: Sequence[int]) -> Conditions:
        """The conditions of some prompts, fp32, (B, ...) each. What is not held is embedded."""
        self._add(prompts)
        found = together([self.held[int(prompt)] for prompt in prompts])
        return {name: values.float() for name, values in found.items()}

    def hold(self, prompts: Iterable[int]) -> None:
        """Embed those of these prompts that are not held, and forget all others but the empty one."""
        wanted = {0, *map(int, prompts)}
        self.held = {prompt: row for prompt, row in self.held.items() if prompt in wanted}
        self._add(wanted)

    def _add(self, prompts: Iterable[int]) -> None:
        missing = sorted({*map(int, prompts)} - self.held.keys())
        if not missing:
            return
        for encoder in self.encoders:
            encoder.to(self.device)
        texts = self.texts.take(pa.array(missing)).to_pylist()
        self.held |= dict(zip(missing, embedded(self.embed, texts, self.cache_dtype), strict=True))
        for parameter, host in self.on_host:  # nothing changes the weights, so the device's copy need not come back
            parameter.data = host
        for encoder in self.encoders:
            encoder.to("cpu")  # its buffers, and quantized weights, which are more than one tensor
        give_back_memory()

    @cached_property
    def stamps(self) -> list[dict[str, Any]]:
        """What a cache's files say of prompts that are longer than the encoder sees; nothing is embedded for it."""
        tokens, limit = token_counter(self.model)
        starts = range(0, len(self.texts), COUNTED_AT_ONCE)
        cut = [pair for start in starts for pair in longer(self.texts.slice(start, COUNTED_AT_ONCE).to_pylist(), tokens, limit)]
        return [{"limit": limit, "cut": cut}]


def prompt_bytes(model: Any, data: config.Data) -> int:
    """Bytes of one prompt's embeddings."""
    return sum(map(prod, model.condition_shapes.values())) * getattr(torch, data.cache_dtype).itemsize


def keeps_prompts(model: Any, data: config.Data, prompts: int) -> bool:
    """Whether so many prompts' embeddings are kept on disk."""
    return prompts * prompt_bytes(model, data) <= LARGEST_CACHE if data.cache_prompts == "auto" else data.cache_prompts


@torch.no_grad()
def embedded(embed: Callable[[list[str]], Conditions], prompts: list[str], dtype: str) -> list[Conditions]:
    """The conditions of each prompt, (1, ...) on the CPU, in `dtype`; `UserError` for what does not fit into it."""
    rows = []
    # One prompt a call, with the attention kernels of the training: kernels differ with the batch, and an embedding must not
    # depend on its company, nor on when it is made.
    with same_with_gradients():
        for prompt in prompts:
            row = {name: values.cpu().to(getattr(torch, dtype)) for name, values in embed([prompt]).items()}
            refuse_overflow(row, prompt, dtype)
            rows.append(row)
    return rows


def together(rows: Sequence[Conditions]) -> Conditions:
    """The conditions of some prompts, (B, ...) each."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def refuse_overflow(conditions: Conditions, prompt: str, dtype: str) -> None:
    """`UserError` when a prompt's embedding does not fit into the cache's dtype."""
    for name, values in conditions.items():
        if not bool(values.isfinite().all()):
            raise UserError(f"{name} of the prompt {prompt!r} is not finite in {dtype}; set seppo.data.cache_dtype to 'float32', or"
                            " check the text encoder if it is so already")


def longer(texts: list[str], tokens: Callable[[list[str]], list[int]], limit: int) -> list[list[Any]]:
    """[prompt, tokens] of those that are longer than `limit`."""
    return [[text, count] for text, count in zip(texts, tokens(texts), strict=True) if count > limit]
