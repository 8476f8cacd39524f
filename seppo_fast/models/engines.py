"""Which of PyTorch's attention kernels may run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

WITHOUT_CUDNN = "+no-cudnn-attention"  # in the key of the compiler's caches


@contextmanager
def same_with_gradients() -> Iterator[None]:
    """Allow only attention kernels whose output is the same, bit for bit, with gradients and without.

    The policy runs with gradients, an equal reference without. cuDNN, the first choice on Hopper, has an engine for each case. The
    flash and memory-efficient kernels only write the log-sum-exp in addition. The setting holds for the whole process, autograd's
    threads included: checkpointing must compute in backward what it computed before.
    """
    with cudnn_attention(False):
        yield


@contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Scaled dot product attention with or without cuDNN, compiled code included."""
    before, tag = torch.backends.cuda.cudnn_sdp_enabled(), torch.compiler.config.cache_key_tag
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    # The compiler's cache on disk does not look at this setting: it would return what was compiled under the other one.
    torch.compiler.config.cache_key_tag = tag.replace(WITHOUT_CUDNN, "") + (WITHOUT_CUDNN if not allowed else "")
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        torch.compiler.config.cache_key_tag = tag
