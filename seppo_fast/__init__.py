"""SePPO: preference alignment of diffusion models without pairs and without a reward model."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`seppo_fast.train`, imported at first use: the module of the command, which can also be called as a function."""
    if name == "train":
        from importlib import import_module

        return import_module("seppo_fast.train")
    raise AttributeError(f"module 'seppo_fast' has no attribute {name!r}")
