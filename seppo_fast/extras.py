"""Packages that only some uses of the program need: the extras of pyproject.toml."""

from importlib import import_module
from types import ModuleType

from seppo_fast.errors import UserError


def need(name: str, what: str, extra: str) -> ModuleType:
    """The package `name`, imported; a `UserError` with pip's command where that fails. `what` needs it, `extra` installs it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{what} needs the package {name}, which is not here ({error}):"
                        f" pip install 'seppo-fast[{extra}]'") from error
