"""Finds and loads the libraries built from csrc/: one for the CPU, one for CUDA. Both add kernels to `seppo_fast::pair_loss`."""

import warnings
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent
LIBRARIES = {"cpu": FOLDER / "_cpu.so", "cuda": FOLDER / "_cuda.so"}
OLDEST_TORCH = (2, 10)


@cache
def why_not(device_type: str) -> str | None:
    """None when the native backend works for tensors of this device type ("cpu", "cuda"), else the reason.

    Loads the library on the first call. One that is there and cannot be loaded is also warned about, once.
    """
    library = LIBRARIES.get(device_type)
    if library is None:
        return f"there is no native library for {device_type} tensors"
    if not library.exists():
        return (f"{library.name} was not built: install seppo_fast from its source with a C++ compiler"
                f"{' and nvcc' if device_type == 'cuda' else ''} at hand (pip install --no-build-isolation)")
    if device_type == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = f"{library.name} cannot be loaded: {error}"
        warnings.warn(f"seppo_fast: {reason}; a slower backend is used", RuntimeWarning, stacklevel=2)
        return reason
    return None
