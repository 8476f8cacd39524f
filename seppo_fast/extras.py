"""Packages that only some uses of the program need: the extras of pyproject.toml."""

from importlib import import_module
from types import ModuleType

from seppo_fast.errors import UserError


def need(name: str, what: str, install: str) -> ModuleType:
    """The package `name`, imported, or a `UserError` that says `what` needs it and what to `install` with pip."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{what} needs the package {name}, which is not here ({error}):"
                        f" pip install '{install}'") from error
