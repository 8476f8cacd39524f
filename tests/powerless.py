"""Permissions count for root, too: as for a person whose files are another's."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

VERSION = 0x20080522
OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def powerless() -> Iterator[None]:
    """This thread, and those that it starts, may not read what a file's mode forbids."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; and once more
    assert libc.capget(header, data) == 0
    before, data[0] = data[0], data[0] & ~OVERRIDES
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = before
        assert libc.capset(header, data) == 0
