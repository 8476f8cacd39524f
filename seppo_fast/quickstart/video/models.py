"""The models that the video quickstart can make, by what `--model` calls them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seppo_fast.quickstart.video import base, flow
from seppo_fast.quickstart.video.base import Recipe


@dataclass(frozen=True)
class Kind:
    """A model's parts, how its base is made, and the configuration that aligns it."""

    parts: str
    recipe: Recipe
    make_base: Callable[[Path, Recipe], bool]
    config: str


KINDS = {
    "unet": Kind("tokenizer, VAE, text encoder and UNet with motion modules", Recipe(), base.make_base, "quickstart_video.json"),
    "flow": Kind("tokenizer, 3-D VAE, text encoder and transformer", flow.RECIPE, flow.make_base, "quickstart_video_flow.json"),
}
