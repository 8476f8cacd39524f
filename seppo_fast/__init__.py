"""SePPO: preference alignment of diffusion models without pairs and without a reward model."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`seppo_fast.train`, which is imported only where it is asked for: it is a function, and the module of the command."""
    if name == "train":
        from importlib import import_module

        return import_module("seppo_fast.train")
    raise AttributeError(f"module 'seppo_fast' has no attribute {name!r}")
