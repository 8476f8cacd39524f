"""The models that the quickstart can make, by what `--model` calls them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seppo_fast.quickstart import base, flow
from seppo_fast.quickstart.base import Recipe


@dataclass(frozen=True)
class Kind:
    """A model's name in pictures and tables, its parts, how its base is made, and the configuration that aligns it."""

    parts: str
    recipe: Recipe
    make_base: Callable[[Path, Recipe], bool]
    config: str


KINDS = {
    "unet": Kind("tokenizer, VAE, text encoder and UNet", Recipe(), base.make_base, "quickstart.json"),
    "flow": Kind("tokenizers, VAE, text encoders and transformer", flow.RECIPE, flow.make_base, "quickstart_flow.json"),
}
