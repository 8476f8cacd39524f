"""What an update was like: means over the whole accumulation window and all ranks, never the last micro-batch."""

import json
import math
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

COLUMNS = ("model_mse_winner", "model_mse_loser", "ref_mse_winner", "ref_mse_loser")


def summarise(table: Tensor) -> dict[str, float]:
    """Means of a window's `(pairs, 6)` table from the objective, or of SFT's `(pairs, 1)`; names as in metrics.jsonl.

    `aaf_rate` is the share of sign == -1, ties included (App. B.2's convention); `implicit_acc` of logits > 0.
    """
    table = table.double()
    means = dict(zip(COLUMNS, table[:, :4].mean(dim=0).tolist(), strict=False))
    if table.shape[1] == 1:
        return {"loss": means["model_mse_winner"], **means}
    sign, logits = table[:, 4], table[:, 5]
    low, middle, high = torch.quantile(logits, torch.tensor([0.05, 0.5, 0.95], dtype=torch.double)).tolist()
    return {"loss": -logsigmoid(logits).mean().item(), **means, "aaf_rate": (sign == -1).double().mean().item(),
            "implicit_acc": (logits > 0).double().mean().item(), "logit_p05": low, "logit_p50": middle,
            "logit_p95": high}


def peak_memory_gb(device: torch.device) -> float:
    """The accelerator's peak in GB (10^9 bytes) since the start, or the process's resident peak without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line to metrics.jsonl; NaN and Inf become null, which JSON has a word for."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with path.open("a") as file:
        file.write(json.dumps(clean) + "\n")


def keep_rows(path: Path, last_update: int, last_evaluated: int) -> None:
    """Drop the updates' and evaluations' rows after these (and a torn last line): a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["update"] <= (last_update if "loss" in row else last_evaluated):
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
