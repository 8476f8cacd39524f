"""Messages for the person who runs the program: what stops it, and what it goes on without."""

import warnings


class UserError(Exception):
    """Bad input: names the file, row or key and says what to do. Printed without a traceback, exit status 2."""


def warn_fallback(key: str, error: Exception) -> None:
    """One warning that the run goes on without what `key` asks for, and why."""
    reason = (str(error).strip() or "no message").splitlines()[0]
    warnings.warn(f"{key} does not work here, and the run goes on without it ({type(error).__name__}: {reason}); set it to \"none\""
                  " or false to be rid of this warning", RuntimeWarning, stacklevel=3)
