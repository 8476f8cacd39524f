"""What the person sees while it runs: progress bars, metrics.jsonl, and DeepSpeed's monitors."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from deepspeed.monitor.monitor import MonitorMaster
from tqdm import tqdm

from seppo_fast.disk import explained
from seppo_fast.errors import UserError
from seppo_fast.training.metrics import append_row


class Reporter:
    """Rank 0's bars and files; on other ranks it is silent."""

    def __init__(self, folder: Path, total_updates: int, done: int, monitor: MonitorMaster, rank: int) -> None:
        self._silent = rank != 0
        self._rows, self._identity = folder / "metrics.jsonl", folder / "run.json"
        self._monitor = monitor
        self._bar = tqdm(total=total_updates, initial=done, desc="training", unit="update", disable=self._silent)

    def sampling(self, count: int) -> AbstractContextManager[tqdm]:
        """A bar for reference samples."""
        return tqdm(total=count, desc="reference samples", unit="sample", leave=False, disable=self._silent or not count)

    def update(self, row: dict[str, Any]) -> None:
        """Record one update."""
        if self._silent:
            return
        self._record(row)
        shown = {"k": row["iteration"], "ref": row["reference"], "loss": f"{row['loss']:.4f}"}
        if "aaf_rate" in row:
            shown |= {"aaf": f"{row['aaf_rate']:.2f}", "acc": f"{row['implicit_acc']:.2f}"}
        shown |= {"pairs/s": f"{row['pairs_per_s']:.1f}", "sampling": f"{row['seconds_sampling'] / max(row['seconds'], 1e-9):.0%}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def evaluation(self, row: dict[str, Any], said: Sequence[str]) -> None:
        """Record the scores of an update's policy, and say them with what else there is to say."""
        if self._silent:
            return
        self._record(row)
        scores = ", ".join(f"{name.removeprefix('eval_')} {'none' if value is None else f'{value:.4g}'}"
                           for name, value in row.items() if name.startswith("eval_"))
        for line in (f"update {row['update']}: {scores}", *said):
            self._bar.write(line)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        if not self._silent:
            self._bar.write(line)

    def _record(self, row: dict[str, Any]) -> None:
        if not self._identity.exists():  # or the rows from here on would make a folder that looks like a run's
            raise UserError(f"{self._rows.parent} (seppo.output_dir) was removed, renamed or unmounted while the run wrote to it;"
                            " what was trained since the last checkpoint is lost. Put it back and go on with --resume auto, or"
                            " begin anew in another seppo.output_dir")
        with explained(self._rows, "put this right and go on with --resume auto"):
            append_row(self._rows, row)
        if self._monitor.enabled:
            # An evaluation's seconds are a part of the next update's, whose column must not have two values a step.
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "update"
                       and ("loss" in row or name.startswith("eval_"))}
            with explained(Path("DeepSpeed's monitors"), "put this right, or switch off tensorboard, wandb, csv_monitor or comet,"
                           " and go on with --resume auto"):
                self._monitor.write_events([(f"seppo/{name}", value, row["update"]) for name, value in numbers.items()])

    def close(self) -> None:
        """Leave the bar as it is and the terminal free."""
        self._bar.close()
