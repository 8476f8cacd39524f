"""status.json in the run folder: how far the run is, for whoever watches it."""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from seppo_fast.disk import TEMPORARY
from seppo_fast.signals import Stop
from seppo_fast.strict import parse_json

FILE = "status.json"
PAUSE = 5.0  # seconds between two writings while nothing but the numbers changes
RECENT = 20  # updates of which the median is shown
MEASURES = ("eval_", "heldout_")  # how the names of an evaluation's measures begin

Evaluation = dict[str, Any]


@dataclass
class Status:
    """What the file says, on rank 0; on other ranks `folder` is None, and nothing is ever written.

    `seconds` are those of the updates since this start, `horizon` is how many of them the estimated end goes by: an iteration's,
    for the first of its updates may draw all of its samples. `shown` is when the file was last written, by the monotonic clock.
    """

    folder: Path | None = None
    state: Literal["caching", "training", "exporting", "stopped", "done", "failed"] = "caching"
    message: str | None = None
    update: int = 0
    updates: int = 0
    horizon: int = 1
    checkpoint: Path | None = None
    evaluation: Evaluation | None = None
    seconds: list[float] = field(default_factory=list)
    shown: float | None = None


@contextmanager
def reported(status: Status) -> Iterator[Status]:
    """A block that is the run: how it ends is written, if `begin` was called in it."""
    try:
        yield status
    except Stop as stop:
        end(status, "stopped", f"by {stop}")
        raise
    except Exception as error:
        end(status, "failed", str(error).split("\n")[0] or type(error).__name__)
        raise
    except BaseException as error:  # Ctrl-C in a program that handles it itself
        end(status, "stopped", f"by {type(error).__name__}")
        raise
    end(status, "done")


def noted(status: Status, lost: Callable[[str], None]) -> Callable[[str], None]:
    """`lost`, which says that another rank is gone, after the same was written: this process then ends without an exception."""
    def say(words: str) -> None:
        end(status, "failed", words)
        lost(words)

    return say


def begin(status: Status, folder: Path, updates: int, horizon: int, resume_from: Path | None, update: int) -> None:
    """The run has been accepted, rank 0 says: an earlier start's file is replaced."""
    status.folder, status.updates, status.horizon, status.update = folder, updates, max(1, horizon), update
    status.checkpoint = resume_from
    write(status)


def train(status: Status, rows: Path) -> None:
    """Training begins; `rows` are those of earlier starts, of which the last evaluation is taken."""
    status.state = "training"
    if status.folder is not None:
        status.evaluation = last_evaluation(rows)
    write(status)


def advance(status: Status, update: int, seconds: float) -> None:
    """An update was made, which took so many seconds."""
    status.update = update
    status.seconds = [*status.seconds, seconds][-max(RECENT, status.horizon):]
    alive(status)


def alive(status: Status) -> None:
    """Write again if the file is older than a few seconds; called between batches."""
    if status.shown is not None and time.monotonic() - status.shown >= PAUSE:
        write(status)


def end(status: Status, state: Literal["stopped", "done", "failed"], message: str | None = None) -> None:
    """The run is over; of one that was refused before it began, nothing is written."""
    if status.shown is not None:
        status.state, status.message = state, message
        write(status)


def write(status: Status) -> None:
    """Replace the file as a whole. An error is ignored: a full disk ends the run where it matters, not here.

    Without fsync, which may take seconds on a shared file system: after a power cut the file is old or empty, and nothing reads it.
    """
    if status.folder is None:
        return
    status.shown = time.monotonic()
    temporary = status.folder / f"{TEMPORARY}{FILE}"
    try:
        temporary.write_text(json.dumps(content(status, datetime.now().astimezone()), indent=1) + "\n")
        os.replace(temporary, status.folder / FILE)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def content(status: Status, now: datetime) -> dict[str, Any]:
    """The keys of the file, as the README names them."""
    ends = None
    left = status.updates - status.update
    if status.state == "training" and status.seconds:
        with suppress(OverflowError):  # ten thousand years
            ends = (now + timedelta(seconds=left * fmean(status.seconds[-status.horizon:]))).isoformat(timespec="seconds")
    return {"state": status.state, "message": status.message, "update": status.update, "updates": status.updates,
            "seconds_an_update": round(median(status.seconds[-RECENT:]), 3) if status.seconds else None, "ends": ends,
            "last_checkpoint": None if status.checkpoint is None else status.checkpoint.name,
            "last_evaluation": status.evaluation, "pid": os.getpid(), "host": socket.gethostname(),
            "written": now.isoformat(timespec="seconds")}


def evaluation_of(row: dict[str, Any]) -> Evaluation | None:
    """The update and the values of an evaluation's row of metrics.jsonl; None of another row."""
    values = {name: None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN
              for name, value in row.items() if name.startswith(MEASURES)}
    return {"update": row.get("update"), **values} if values else None


def last_evaluation(rows: Path) -> Evaluation | None:
    """That of the last row of an evaluation."""
    lines: Sequence[str] = ()
    with suppress(OSError, UnicodeDecodeError):
        lines = rows.read_text().splitlines()
    for line in reversed(lines):
        if any(f'"{start}' in line for start in MEASURES):
            with suppress(ValueError):
                row = parse_json(line)
                if isinstance(row, dict) and (found := evaluation_of(row)):
                    return found
    return None
