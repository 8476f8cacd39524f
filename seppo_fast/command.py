"""How a command ends: the same exit statuses and messages for all commands that have nothing to save."""

import os
import sys
from collections.abc import Callable

from seppo_fast import __version__
from seppo_fast.errors import UserError
from seppo_fast.failure import FirstFailure, explained
from seppo_fast.signals import Stop, StopSignals


def announce() -> None:
    """Print rank 0's first line, before the imports that take long."""
    if os.environ.get("RANK", "0") == "0":
        print(f"seppo_fast {__version__}: importing PyTorch, DeepSpeed and diffusers, which may take half a minute ...",
              file=sys.stderr, flush=True)


def carried_out(work: Callable[[StopSignals, Callable[[str], None]], None], kept: str = "") -> int:
    """Do `work`, which joins the ranks, with its second argument for the message of a lost rank.

    Exit status: 0, 2 for bad input, 1 for any other error, 128 + the number of a signal. `kept` is printed after the name of a
    signal that stopped the work. Only the first rank that fails prints.
    """
    failure, signals = FirstFailure(), StopSignals()
    announce()
    try:
        from seppo_fast.ranks import leave, quiet_libraries

        quiet_libraries()
        work(signals, failure.lost(kept or "start again"))
        leave()
        failure.close()
        return 0
    except Stop as stop:
        status, words = 128 + stop.signum, f"stopped by {stop}{kept and '; '}{kept}"
    except UserError as error:
        status, words = 2, f"seppo_fast: {error}"
    except Exception as error:
        status, words = 1, f"seppo_fast: {explained(error, kept or 'start again')}"
    failure.say(words)
    failure.close()
    sys.stdout.flush()
    os._exit(status)  # see train.py
