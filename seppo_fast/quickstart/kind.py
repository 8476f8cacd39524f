"""What a quickstart needs to know of a model that it can make."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

Recipe = TypeVar("Recipe")


@dataclass(frozen=True)
class Kind(Generic[Recipe]):
    """A model's parts in words, how its base is made, and the configuration that aligns it."""

    parts: str
    recipe: Recipe
    make_base: Callable[[Path, Recipe], bool]
    config: str
