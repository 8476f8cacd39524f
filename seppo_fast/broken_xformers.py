"""Hides an xformers that is installed but cannot be imported: diffusers' models would fail with it.

Import this module before them.
"""

from diffusers.utils import import_utils, is_xformers_available

from seppo_fast.errors import reason


def hide() -> str | None:
    """Why the installed xformers cannot be imported; None where it can be, or is not installed."""
    if not is_xformers_available():
        return None
    try:
        import xformers.ops  # noqa: F401
    except Exception as error:  # a build for another PyTorch or CUDA may raise anything
        import_utils._xformers_available = False  # all that is_xformers_available() looks at
        return f"xformers is installed and cannot be imported ({reason(error)})"
    return None


WHY = hide()
