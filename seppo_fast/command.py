"""How a command ends: the same statuses and words for all that have nothing to save."""

import os
import sys
import traceback
from collections.abc import Callable

from seppo_fast.errors import UserError
from seppo_fast.ranks import FirstFailure, Stop, leave, quiet_libraries


def carried_out(work: Callable[[], None], kept: str = "") -> int:
    """Do `work`, which joins the ranks. Exit status: 0, 2 for bad input, 1 anything else, 128 + the signal's number when stopped.

    `kept` is what the person is told of a stop beside the signal's name. Only the first rank to fail speaks.
    """
    quiet_libraries()
    failure = FirstFailure()
    try:
        work()
        leave()
        return 0
    except Stop as stop:
        status, words = 128 + stop.signum, f"stopped by {stop}{kept}"
    except UserError as error:
        status, words = 2, f"seppo_fast: {error}"
    except Exception:
        status, words = 1, f"seppo_fast: rank {os.environ.get('RANK', 0)} failed\n{traceback.format_exc()}"
    if failure.is_ours():
        print(words, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)  # see train.py
