"""Runs that share a cache do not do the same work twice."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from seppo_fast.lock import UNSUPPORTED, Busy, locked

PAUSE = 0.5  # seconds between two looks at what another run is making


def in_turn(arrows: Mapping[int, Path], work: Callable[[int], None]) -> None:
    """Calls `work` with the number of each file, while this run holds the file's lock. Files that another run makes come last.

    It waits until the other run has made it or died; `work` then finds out whether it is there.
    """
    left, told = list(arrows), set()
    while left:
        busy: dict[int, Busy] = {}
        for number in left:
            with ExitStack() as stack:
                try:
                    hold(arrows[number], stack)
                except Busy as other:
                    busy[number] = other
                    continue
                work(number)
        if len(busy) == len(left):
            for number in busy.keys() - told:
                print(f"waiting for {arrows[number]}, which another run is making: {busy[number]}", file=sys.stderr, flush=True)
                told.add(number)
            time.sleep(PAUSE)
        left = list(busy)


def hold(arrow: Path, stack: ExitStack) -> None:
    """Locks the file. Where the file system has no locks, nothing is locked: two runs may make the file, and the last one stays."""
    lock = arrow.with_suffix(".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(lock, without_flock=False))
    except OSError as error:
        if error.errno in UNSUPPORTED:
            lock.unlink(missing_ok=True)
