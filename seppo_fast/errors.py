"""Messages for the person who runs the program: what stops it, and what it goes on without."""

import warnings
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: names the file, row or key and says what to do. Printed without a traceback, exit status 2."""


def reason(error: Exception) -> str:
    """An error in a few words: its type and first line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def warn_fallback(key: str, error: Exception) -> None:
    """One warning that the run goes on without what `key` asks for, and why."""
    warnings.warn(f"{key} does not work here, and the run goes on without it ({reason(error)}); set it to \"none\" or false to"
                  " silence this warning", RuntimeWarning, stacklevel=3)


def few(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
