"""Prompts that are longer than a model's text encoders can see."""

from collections.abc import Callable
from typing import Any

from seppo_fast.models.common import load_tokenizer, most_tokens


def token_counter(model: Any) -> tuple[Callable[[list[str]], list[int]], int]:
    """(prompts -> number of tokens of each, number that is seen), of the encoder that sees least; start and end tokens count."""
    tokenizers = {part: load_tokenizer(model.directory, part.replace("text_encoder", "tokenizer")) for part in model.text_encoders}
    limits = {part: most_tokens(tokenizer, model.directory.configs[part].get("max_position_embeddings", 77))
              for part, tokenizer in tokenizers.items()}
    part = min(limits, key=lambda part: limits[part])
    tokenizer = tokenizers[part]
    return lambda prompts: [len(ids) for ids in tokenizer(prompts, verbose=False)["input_ids"]], limits[part]


def cut_off(counted: list[tuple[str, int]], limit: int) -> str:
    """A message of how many of these (prompt, tokens) are longer than `limit`; "" where none is."""
    longer = [tokens for _, tokens in counted if tokens > limit]
    if not longer:
        return ""
    has = "1 is longer" if len(longer) == 1 else f"{len(longer)} are longer"
    return f"{has} than the {limit} tokens that the text encoder sees (the longest has {max(longer)}), and their ends are not seen"
