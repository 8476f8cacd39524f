"""Which of PyTorch's attention kernels may run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

WITHOUT_CUDNN = "+no-cudnn-attention"  # in the key of the compiler's caches


@contextmanager
def same_with_gradients() -> Iterator[None]:
    """Scaled dot product attention by kernels alone whose output is the same, bit for bit, with gradients and without.

    The policy is asked with them, its equal reference without. cuDNN, on Hopper the first choice, has an engine for each; the
    kernels for flash and memory-efficient attention only write the log-sum-exp besides. It holds for the whole process,
    autograd's threads too: what checkpointing computes again in backward must be computed as before.
    """
    with cudnn_attention(False):
        yield


@contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Scaled dot product attention with or without cuDNN, compiled code included."""
    before, tag = torch.backends.cuda.cudnn_sdp_enabled(), torch.compiler.config.cache_key_tag
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    # The compiler's cache on disk does not look at the setting: what was compiled under the other one would come back.
    torch.compiler.config.cache_key_tag = tag.replace(WITHOUT_CUDNN, "") + (WITHOUT_CUDNN if not allowed else "")
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        torch.compiler.config.cache_key_tag = tag
