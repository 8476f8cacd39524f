"""What a run shows while it trains: progress bars, metrics.jsonl, and DeepSpeed's monitors."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from deepspeed.monitor.monitor import MonitorMaster
from PIL import Image
from tqdm import tqdm

from seppo_fast.disk import explained
from seppo_fast.errors import UserError
from seppo_fast.training import status
from seppo_fast.training.metrics import append_row
from seppo_fast.training.status import MEASURES, Status

MONITORS = "put this right, or switch off tensorboard, wandb, csv_monitor or comet, and go on with --resume auto"


class Reporter:
    """Rank 0's bars and files; on other ranks it is silent. `status` is what status.json says."""

    def __init__(self, folder: Path, total_updates: int, done: int, monitor: MonitorMaster, rank: int,
                 progress: Status | None = None) -> None:
        self._silent = rank != 0
        self._rows, self._identity = folder / "metrics.jsonl", folder / "run.json"
        self._monitor = monitor
        self.status = progress or Status()
        self._told_of_ties = False
        self._tasks: list[dict[str, Any]] = []  # the rows of an iteration that have losses by task
        self._bar = tqdm(total=total_updates, initial=done, desc="training", unit="update", disable=self._silent)

    def sampling(self, count: int) -> AbstractContextManager[tqdm]:
        """A bar for reference samples."""
        return tqdm(total=count, desc="reference samples", unit="sample", leave=False, disable=self._silent or not count)

    def update(self, row: dict[str, Any]) -> None:
        """Record one update."""
        if self._silent:
            return
        self._record(row)
        status.advance(self.status, row["update"], row["seconds"])
        self.see_whether_the_image_counts(row)
        shown = {"k": row["iteration"], "ref": row["reference"], "loss": f"{row['loss']:.4f}"}
        shown |= {short: f"{row[name]:.2f}" for short, name in (("aaf", "aaf_rate"), ("acc", "implicit_acc")) if name in row}
        shown |= {"pairs/s": f"{row['pairs_per_s']:.1f}", "sampling": f"{row['seconds_sampling'] / max(row['seconds'], 1e-9):.0%}"}
        if not self._told_of_ties and row.get("logit_p05") == row.get("logit_p95") == 0:
            self._told_of_ties = True
            flips = ", aaf 1.00 that each reference sample counts as a loser" if "aaf_rate" in row else ""
            more = "" if math.isclose(row["loss"], math.log(2)) else " and what sft_weight adds"
            self.say(f"update {row['update']}: policy and reference are still equal, so all pairs are ties: loss {row['loss']:.4f}"
                     f" is log 2{more}, acc 0.00 that no pair is decided yet{flips}. It changes with the next updates")
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def see_whether_the_image_counts(self, row: dict[str, Any]) -> None:
        """Say at an iteration's end if the improvement model ignores its image: Eq. 7 is then no easier for it than Eq. 8."""
        if self._tasks and row.get("iteration") != self._tasks[0]["iteration"]:
            with_image, without = ([found[name] for found in self._tasks if name in found]
                                   for name in ("loss_reconstruct", "loss_unconditional"))
            if with_image and without and not fmean(with_image) < fmean(without):
                self.say(f"iteration {self._tasks[0]['iteration']}: reconstructing a picture from itself has a loss of"
                         f" {fmean(with_image):.4f}, and from nothing {fmean(without):.4f}: it ignores its image so far"
                         " and cannot improve one. Train longer, or raise seppo.improvement.tasks.reconstruct or the learning rate")
            self._tasks = []
        if "loss_reconstruct" in row or "loss_unconditional" in row:
            self._tasks.append(row)

    def evaluation(self, row: dict[str, Any], notes: Sequence[str]) -> None:
        """Record the scores of an update's policy, and print them and the notes."""
        if self._silent:
            return
        self._record(row)
        self.status.evaluation = status.evaluation_of(row)
        status.write(self.status)
        scores = ", ".join(f"{name.removeprefix('eval_')} {'none' if value is None else f'{value:.4g}'}"
                           for name, value in row.items() if name.startswith(MEASURES))
        for line in (f"update {row['update']}: {scores}", *notes):
            self._bar.write(line)

    def checkpoint(self, path: Path) -> None:
        """There is a new checkpoint."""
        self.status.checkpoint = path
        status.write(self.status)

    def grid(self, update: int, file: Path) -> None:
        """Show a grid of samples in TensorBoard and W&B; of video clips, the middle frame."""
        boards, runs = self._monitor.tb_monitor, self._monitor.wandb_monitor
        if self._silent or boards is None and runs is None:
            return
        with Image.open(file) as picture, explained(file, MONITORS):
            picture.seek(getattr(picture, "n_frames", 1) // 2)
            pixels = np.asarray(picture.convert("RGB"))
            if boards is not None:
                boards.summary_writer.add_image("seppo/samples", pixels, update, dataformats="HWC")
                boards.flush()
            if runs is not None:
                from wandb import Image as Shown

                runs.log({"seppo/samples": Shown(pixels)}, step=update)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        if not self._silent:
            self._bar.write(line)

    def _record(self, row: dict[str, Any]) -> None:
        if not self._identity.exists():  # else the rows from here on would make a new folder that looks like a run's
            raise UserError(f"{self._rows.parent} (seppo.output_dir) was removed, renamed or unmounted while the run wrote to it;"
                            " what was trained since the last checkpoint is lost. Put it back and go on with --resume auto, or"
                            " begin anew in another seppo.output_dir")
        with explained(self._rows, "put this right and go on with --resume auto"):
            append_row(self._rows, row)
        if self._monitor.enabled:
            # An evaluation's seconds are a part of the next update's, whose column must not have two values a step.
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "update"
                       and ("loss" in row or name.startswith(MEASURES))}
            with explained(Path("DeepSpeed's monitors"), MONITORS):
                self._monitor.write_events([(f"seppo/{name}", value, row["update"]) for name, value in numbers.items()])

    def close(self) -> None:
        """End the progress bar."""
        self.see_whether_the_image_counts({})
        self._bar.close()
