"""status.json: what it says while a run goes on, and after each way to end; that it never ends a run itself."""

import json
import os
import resource
import signal
import socket
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from forked import Forks, Strike

from seppo_fast.errors import UserError
from seppo_fast.signals import Stop
from seppo_fast.training import status
from seppo_fast.training.status import Status

Settings = Callable[..., dict[str, Any]]


def said(folder: Path) -> dict[str, Any]:
    """The file; what is no time of this minute in it is an error."""
    found = json.loads((folder / "status.json").read_text())
    written = datetime.fromisoformat(found["written"])
    assert written.tzinfo is not None and abs(datetime.now(written.tzinfo) - written) < timedelta(minutes=5)
    return found


def test_the_end_is_estimated_by_the_last_iteration(tmp_path: Path) -> None:
    """The first update of an iteration draws its samples: the median leaves it out, and the estimate must not."""
    shown = Status()
    status.begin(shown, tmp_path, updates=100, horizon=4, resume_from=None, update=0)
    status.train(shown, tmp_path / "metrics.jsonl")
    assert said(tmp_path)["ends"] is None and said(tmp_path)["seconds_an_update"] is None
    for update, seconds in enumerate([500.0, 70.0, 10.0, 10.0, 10.0], start=1):
        status.advance(shown, update, seconds)
    now = datetime.fromisoformat("2026-01-31T23:00:00+02:00")
    found = status.content(shown, now)
    assert (found["update"], found["updates"], found["seconds_an_update"]) == (5, 100, 10.0)
    assert datetime.fromisoformat(found["ends"]) == now + timedelta(seconds=95 * 25)
    assert found["ends"].endswith("+02:00")


def test_numbers_are_written_every_few_seconds_and_changes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: clock[0])
    shown = Status()
    status.alive(shown)  # no run has begun: nothing to write
    status.end(shown, "failed", "refused")
    status.begin(shown, tmp_path, 9, 3, tmp_path / "checkpoints" / "update_00000002", 2)
    for update in (3, 4):
        status.advance(shown, update, 1.0)
        clock[0] += status.PAUSE / 2
    assert said(tmp_path)["update"] == 2 and said(tmp_path)["last_checkpoint"] == "update_00000002"
    status.alive(shown)
    assert said(tmp_path)["update"] == 4
    status.end(shown, "done")
    assert said(tmp_path)["state"] == "done" and [file.name for file in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(("error", "state", "message"), [
    (UserError("no room\nmore"), "failed", "no room"), (ValueError(), "failed", "ValueError"),
    (Stop(signal.SIGTERM), "stopped", "by SIGTERM"), (KeyboardInterrupt(), "stopped", "by KeyboardInterrupt"),
])
def test_how_it_ended(error: BaseException, state: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), status.reported(Status()) as shown:
        raise error
    assert not list(tmp_path.iterdir()), "it had not begun: an earlier run's file must stay"
    with pytest.raises(type(error)), status.reported(Status()) as shown:
        status.begin(shown, tmp_path, 4, 2, None, 0)
        raise error
    assert (said(tmp_path)["state"], said(tmp_path)["message"]) == (state, message)


def test_a_full_disk_is_no_obstacle(tmp_path: Path) -> None:
    shown = Status()
    status.begin(shown, tmp_path, 4, 2, None, 0)
    before = (tmp_path / "status.json").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the nearest to a full disk that needs no disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        status.end(shown, "done")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"] and (tmp_path / "status.json").read_bytes() == before


def test_the_last_evaluation_of_earlier_starts(tmp_path: Path) -> None:
    rows = tmp_path / "metrics.jsonl"
    assert status.last_evaluation(rows) is None
    rows.write_text("\n".join(['{"update": 0, "eval_x": 1.5, "seconds_evaluation": 1}', '{"update": 1, "eval_x": null}',
                               '{"update": 2, "loss": 1}', '{"update": 2, "eval_']))
    assert status.last_evaluation(rows) == {"update": 1, "eval_x": None}
    assert status.evaluation_of({"update": 3, "heldout_gain": float("nan")}) == {"update": 3, "heldout_gain": None}


def test_killed_stopped_and_done(settings: Settings, forks: Forks, tmp_path: Path) -> None:
    raw = settings(**{"seppo.checkpoint.every": 1, "seppo.data.hold_out": 4, "seppo.evaluation": {"every": 2}})
    run = tmp_path / "run"
    assert forks.run(raw, strike=Strike("seppo_fast.training.trainer:Trainer.report", 3)).status == -signal.SIGKILL
    killed = said(run)
    assert killed["state"] == "training" and killed["host"] == socket.gethostname() and killed["updates"] == 4
    assert not os.path.exists(f"/proc/{killed['pid']}"), "a watcher can see that it is gone"
    assert killed["last_checkpoint"] == "update_00000002" and killed["last_evaluation"]["update"] == 2
    assert killed["last_evaluation"].keys() > {"update", "heldout_winner_gain"}

    refused = forks.run(raw)
    assert refused.status == 2 and said(run) == killed, "a command that is refused is not this run"
    stop = Strike("seppo_fast.training.trainer:Trainer.report", 1, signal.SIGTERM)
    assert forks.run(raw, "--resume", "auto", ranks=1, strike=stop).status == 0
    stopped = said(run)
    assert (stopped["state"], stopped["message"], stopped["update"]) == ("stopped", "by SIGTERM", 3)
    assert stopped["last_checkpoint"] == "update_00000003" and stopped["last_evaluation"] == killed["last_evaluation"]

    assert forks.run(raw, "--resume", "auto").status == 0
    done = said(run)
    assert (done["state"], done["message"], done["update"], done["ends"]) == ("done", None, 4, None)
    assert done["last_checkpoint"] == "update_00000004" and done["last_evaluation"]["update"] == 4
    assert done["seconds_an_update"] > 0 and done.keys() == killed.keys()
