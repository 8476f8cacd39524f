"""Prompts that are longer than a model's text encoders can see."""

from collections.abc import Callable

from seppo_fast.models.common import load_tokenizer
from seppo_fast.models.contract import Model


def token_counter(model: Model) -> tuple[Callable[[list[str]], list[int]], int]:
    """(prompts -> number of tokens of each, number that is seen), of the encoder that sees most; start and end tokens count."""
    part = max(model.prompt_tokens, key=lambda part: model.prompt_tokens[part])
    tokenizer = load_tokenizer(model.directory, part.replace("text_encoder", "tokenizer"))
    return lambda prompts: [len(ids) for ids in tokenizer(prompts, verbose=False)["input_ids"]], model.prompt_tokens[part]


def cut_off(counted: list[tuple[str, int]], limit: int) -> str:
    """A message of how many of these (prompt, tokens) are longer than `limit`; "" where none is."""
    longer = [tokens for _, tokens in counted if tokens > limit]
    if not longer:
        return ""
    has = "1 is longer" if len(longer) == 1 else f"{len(longer)} are longer"
    return f"{has} than the {limit} tokens that the text encoder sees (the longest has {max(longer)}), and their ends are not seen"
