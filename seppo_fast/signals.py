"""SIGTERM and SIGINT, handled from the start of a command: this module imports nothing that takes time."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seppo_fast.ranks import Ranks


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


class StopSignals:
    """Handlers of SIGTERM and SIGINT; the first signal counts. Once `deferred`, all ranks raise `Stop` later, at the same place."""

    def __init__(self, signums: Iterable[int] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self.received = 0
        self.deferred = False  # before training there is nothing to save
        self.joined = False
        for signum in signums:
            signal.signal(signum, self._remember)

    def check(self, ranks: "Ranks") -> None:
        """Raise `Stop` if any rank got a signal; every rank must call."""
        signum = ranks.largest(self.received)
        if signum:
            raise Stop(signum, together=True)

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
