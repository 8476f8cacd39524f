"""Finds and loads the libraries built from csrc/, one for the CPU and one for CUDA; both add kernels to `seppo_fast::pair_loss`."""

import ctypes
import warnings
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent
LIBRARIES = {"cpu": FOLDER / "_cpu.so", "cuda": FOLDER / "_cuda.so"}
OLDEST_TORCH = (2, 10)
OLDEST_GPU = (8, 0)
ABI = 6  # SEPPO_ABI of csrc/pair_loss.h: the version of the operators' arguments, which nothing else checks


def why_not(device: torch.device) -> str | None:
    """None when the native backend works for tensors on this device, else the reason. Loads the library on the first call."""
    library = LIBRARIES.get(device.type)
    if library is None:
        return f"there is no native library for {device.type} tensors"
    if not library.exists():
        return (f"{library.name} was not built: install seppo_fast from its source with a C++ compiler"
                f"{' and nvcc' if device.type == 'cuda' else ''} (pip install -v --no-build-isolation says what is missing)")
    return (gpu_lacks(device.index) if device.type == "cuda" else None) or _load(library)


@cache
def _load(library: Path) -> str | None:
    """None when the library is loaded, else why it cannot be; that is also a warning, given once."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    try:
        torch.ops.load_library(library)
        found = getattr(ctypes.CDLL(str(library)), "seppo_fast_abi", lambda: 0)()
        reason = None if found == ABI else (f"{library.name} was built from other sources (its interface is {found}, not {ABI}):"
                                            " install seppo_fast again")
    except OSError as error:
        reason = f"{library.name} cannot be loaded: {error.__cause__ or error}"  # torch's own words leave the cause out
    if reason:
        warnings.warn(f"seppo_fast: {reason}; a slower backend is used", RuntimeWarning, stacklevel=2)
    return reason


def gpu_lacks(index: int | None) -> str | None:
    """Why kernels for `OLDEST_GPU` and later cannot run on this GPU (None: the current one), or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if (capability := torch.cuda.get_device_capability(index)) < OLDEST_GPU:
        return f"it wants compute capability 8.0 or newer, this GPU has {'.'.join(map(str, capability))}"
    return None
