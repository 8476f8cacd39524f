"""Memory of networks that are not needed any more."""

import gc

import torch


def give_back_memory() -> None:
    """Frees the memory of a network for the training; no reference to what is on the device may be left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
