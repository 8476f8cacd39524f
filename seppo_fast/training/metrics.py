"""Figures of an update: means over the whole accumulation window and all ranks, not of the last micro-batch."""

import json
import math
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from seppo_fast.disk import complete_or_not, explained
from seppo_fast.strict import parse_json
from seppo_fast.training.tasks import NAMES as TASKS

COLUMNS = ("model_mse_winner", "model_mse_loser", "ref_mse_winner", "ref_mse_loser")


def summarise(table: Tensor, flips: bool, sft_weight: float = 0.0) -> dict[str, float]:
    """Means of a window's `(pairs, 6)` table from the objective, or of SFT's `(pairs, 1)`; names as in metrics.jsonl.

    Of the improvement model's `(pairs, 2)`, means by task; a task that no slot of the window had is left out.

    `aaf_rate` is the share of sign == -1, ties included (App. B.2's convention), and left out where nothing `flips`;
    `implicit_acc` of logits > 0. `loss` contains `sft_weight` times the winners' errors. `winner_gain` and `loser_gain` are the
    reference's error minus the policy's, `winner_worse` is the share of pairs whose winner the policy predicts worse than the
    reference: both errors can rise while the loss falls.
    """
    table = table.double()
    if table.shape[1] == 2:  # (error, task)
        by_task = {name: table[table[:, 1] == kind, 0] for kind, name in enumerate(TASKS)}
        return {"loss": table[:, 0].mean().item()} | {f"loss_{name}": errors.mean().item() for name, errors in by_task.items()
                                                      if len(errors)}
    means = dict(zip(COLUMNS, table[:, :4].mean(dim=0).tolist(), strict=False))
    if table.shape[1] == 1:
        return {"loss": means["model_mse_winner"], **means}
    gains, sign, logits = table[:, 2:4] - table[:, :2], table[:, 4], table[:, 5]
    low, middle, high = torch.quantile(logits, torch.tensor([0.05, 0.5, 0.95], dtype=torch.double)).tolist()
    rate = {"aaf_rate": (sign == -1).double().mean().item()} if flips else {}
    added = sft_weight * means["model_mse_winner"] if sft_weight else 0.0
    return {"loss": -logsigmoid(logits).mean().item() + added, **means, **rate,
            "winner_gain": gains[:, 0].mean().item(), "loser_gain": gains[:, 1].mean().item(),
            "winner_worse": (gains[:, 0] < 0).double().mean().item(),
            "implicit_acc": (logits > 0).double().mean().item(), "logit_p05": low, "logit_p50": middle,
            "logit_p95": high, "abs_logit_p50": logits.abs().median().item()}


def peak_memory_gb(device: torch.device) -> float:
    """The accelerator's peak in GB (10^9 bytes) since the start, or the process's resident peak without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line to metrics.jsonl; NaN and Inf, which JSON lacks, become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with path.open("a") as file:
        file.write(json.dumps(clean) + "\n")


def keep_rows(path: Path, last_update: int, last_evaluated: int) -> list[int]:
    """Remove rows after the last update and evaluation, which a resumed run writes again, and lines that are no rows.

    Returns the numbers of the lines that are no rows, without a last line that a kill cut off.
    """
    if not path.exists():
        return []
    with explained(path, "put this right, or move it away: training does not need its rows"):
        *whole, torn = path.read_bytes().split(b"\n")
        verdicts = [_stays(line, last_update, last_evaluated) for line in whole]
        kept = [line for line, stays in zip(whole, verdicts, strict=True) if stays]
        if len(kept) < len(whole) or torn:
            with complete_or_not(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))
    return [number for number, stays in enumerate(verdicts, start=1) if stays is None]


def _stays(line: bytes, last_update: int, last_evaluated: int) -> bool | None:
    """Whether a line's row stays; None for a line that is no row."""
    try:
        row = parse_json(line)
    except ValueError:  # not JSON, not UTF-8
        return None
    update = row.get("update") if isinstance(row, dict) else None
    if not isinstance(update, int) or isinstance(update, bool):
        return None
    return update <= (last_update if "loss" in row else last_evaluated)
