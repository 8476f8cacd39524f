"""metrics.jsonl and DeepSpeed's CSV files: one row a step after any number of starts, whatever has become of them meanwhile."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Forks, Strike

from seppo_fast.errors import UserError
from seppo_fast.training.metrics import keep_rows


def test_what_is_no_row_is_dropped_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [b'{"update": 1, "loss": 0.5}', b'{"update": 1, "eval_x": 2.0}', b'{"update": 2, "loss": null}']
    bad = [b"12", b"{}", b'{"update": "2", "loss": 1}', b'{"update": true}', b"\xff\xfe", b"", b"null", b"[" * 100_000]
    path.write_bytes(b"\n".join([good[0], *bad, *good[1:], b'{"update": 3, "loss": 0.1}', b'{"update": 2, "lo']))
    assert keep_rows(path, 2, 1) == list(range(2, 10))
    assert path.read_bytes() == b"".join(line + b"\n" for line in good)
    assert keep_rows(path, 1, 0) == [] and path.read_bytes() == good[0] + b"\n"
    path.unlink()
    assert keep_rows(path, 1, 0) == []
    path.mkdir()
    with pytest.raises(UserError, match="metrics.jsonl"):
        keep_rows(path, 1, 0)


def steps(folder: Path) -> dict[str, list[list[str]]]:
    """The rows of each CSV file, the header too."""
    return {file.name: list(csv.reader(file.read_text().splitlines())) for file in sorted(folder.glob("*.csv"))}


def test_csv_monitor_has_one_row_a_step(settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    """A kill after the third update's row, and another one; then a run of another folder finds its place taken."""
    raw = settings(csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "job"})
    row = "seppo_fast.training.trainer:Trainer.report"
    for number in (3, 1):
        assert forks.run(raw, "--resume", "auto", strike=Strike(row, number, after=True)).status == -9
    assert forks.run(raw, "--resume", "auto").status == 0
    found = steps(tmp_path / "job")
    assert {"seppo_loss.csv", "seppo_seconds_pool.csv", "Train_Samples_lr.csv"} <= found.keys()
    for name, (header, *lines) in found.items():
        unit = 8 if name.startswith("Train") else 1
        assert header[0] == "step" and [int(step) for step, _ in lines] == [unit * n for n in (1, 2, 3, 4)], name
    raw["seppo"]["output_dir"] = str(tmp_path / "other")
    assert "held the files of another run, which are renamed" in forks.run(raw).output
    assert len(steps(tmp_path / "job")["seppo_loss.csv"]) == 5 and (tmp_path / "job" / "seppo_loss.csv.1").exists()


def test_a_run_folder_that_is_removed(settings: Callable[..., dict[str, Any]], train: Callable[..., Path], tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """While the third update is made; none of it is left half there."""
    from seppo_fast.training.trainer import Trainer

    update_policy = Trainer.update_policy

    def removed(trainer: Trainer, update: int) -> Any:
        if update == 2:
            shutil.rmtree(tmp_path / "run")
        return update_policy(trainer, update)

    monkeypatch.setattr(Trainer, "update_policy", removed)
    with pytest.raises(UserError, match=f"{tmp_path / 'run'} .*was removed, renamed or unmounted"):
        train(settings())
    assert not (tmp_path / "run").exists()
