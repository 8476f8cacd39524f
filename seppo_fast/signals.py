"""SIGTERM and SIGINT, handled from the start of a command: this module imports nothing that takes time."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seppo_fast.ranks import Ranks


PAUSE = 2.0  # seconds between two exchanges of signals


class Stop(BaseException):
    """A signal asked the run to stop. Raised where a checkpoint can be written, which `checkpoint` then names.

    Like KeyboardInterrupt not an `Exception`, so that code that skips bad images lets it pass. `together`: all ranks raise it.
    """

    checkpoint: Path | None = None
    while_doing: str = ""

    def __init__(self, signum: int, together: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.together = together


@dataclass
class Loop:
    """When the ranks ask one another again in a loop whose passes are equally many on all ranks: about every `PAUSE` seconds."""

    left: int = 0  # passes until then
    passes: int = 0  # timed since the last time
    seconds: float = 0.0
    pace: float = 0.0  # seconds a pass on the slowest rank; it falls by half at most, as the first passes may be quick or slow

    def agree(self, slowest: float) -> None:
        """Plan from the ranks' largest seconds a pass, which all of them know."""
        self.pace = max(slowest, self.pace / 2)
        self.left = max(1, int(PAUSE / self.pace)) if slowest else 1  # none was timed: each came alone
        self.passes, self.seconds = 0, 0.0


class StopSignals:
    """Handlers of SIGTERM and SIGINT; the first signal counts. Once `deferred`, all ranks raise `Stop` later, at the same place."""

    def __init__(self, signums: Iterable[int] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self.received = 0
        self.deferred = False  # before training there is nothing to save
        self.joined = False
        self._loops: dict[str, Loop] = {}
        self._last = ("", 0.0)  # the loop of the last pass, and when that was
        for signum in signums:
            signal.signal(signum, self._remember)

    def check(self, ranks: "Ranks") -> None:
        """Raise `Stop` if any rank got a signal; every rank must call."""
        self._last = ("", 0.0)
        if signum := ranks.largest(self.received):
            raise Stop(signum, together=True)

    def check_now_and_then(self, ranks: "Ranks", name: str) -> None:
        """The same in each pass of a loop, by its name: the ranks exchange something every few seconds only.

        The number of passes between is agreed with each exchange. A rank's own clock measures them, and the slowest rank decides.
        """
        loop, now = self._loops.setdefault(name, Loop()), time.monotonic()
        if self._last[0] == name:
            loop.passes += 1
            loop.seconds += now - self._last[1]
        loop.left -= 1
        if loop.left <= 0 or ranks.world == 1:
            signum, slowest = ranks.largest_of_each([self.received, int(1e6 * loop.seconds / max(1, loop.passes))])
            if signum:
                raise Stop(signum, together=True)
            loop.agree(slowest / 1e6)
            now = time.monotonic()  # what it waited for others is not the pass's time
        self._last = (name, now)

    def check_alone(self) -> None:
        """Raise `Stop` if this rank got a signal."""
        if self.received:
            raise Stop(self.received)

    def status(self, signum: int) -> int:
        """The exit status of a run that a signal stopped; not 0 before the ranks have joined, or a launcher would wait on."""
        return 0 if self.joined and signum == signal.SIGTERM else 128 + signum

    def _remember(self, signum: int, _frame: object) -> None:
        if self.received:  # a second one, from the launcher or an impatient person, must not break the stop that began
            return
        self.received = signum
        if not self.deferred:
            raise Stop(signum)
        if os.environ.get("RANK", "0") == "0":
            # Not print(): the signal may have interrupted one.
            os.write(2, f"\n{signal.Signals(signum).name}: stopping after this micro-batch, with a checkpoint\n".encode())


@contextmanager
def handled() -> Iterator[StopSignals]:
    """Signal handlers for a run inside a program that goes on afterwards. Python allows handlers in the main thread only."""
    signums = (signal.SIGTERM, signal.SIGINT)
    before = {signum: signal.getsignal(signum) for signum in signums if threading.current_thread() is threading.main_thread()}
    try:
        yield StopSignals(before)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
