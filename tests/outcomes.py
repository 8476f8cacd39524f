"""What a finished run left behind, and a small Pick-a-Pic file for the methods that need pairs."""

import io
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from forked import Forks, Strike
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]


def weights(run: Path) -> Weights:
    """The trained UNet (or the LoRA file) of a run folder."""
    unet = run / "final" / "unet" / "diffusion_pytorch_model.safetensors"
    return load_file(unet if unet.exists() else run / "final" / "pytorch_lora_weights.safetensors")


def unet_of(pipeline: Path) -> Weights:
    """The UNet of a pipeline directory."""
    return load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")


def apart(one: Weights, other: Weights) -> float:
    """The largest difference between two models' weights."""
    assert one.keys() == other.keys()
    assert all(torch.isfinite(weight).all() for model in (one, other) for weight in model.values())
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def identical(one: Weights, other: Weights) -> bool:
    """Whether two models' weights are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steady_rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    clock = ("seconds", "pairs_per_s", "peak_memory")
    return [{name: value for name, value in row.items() if not name.startswith(clock)} for row in rows(run)]


def check_rows(run: Path, tables: list[Tensor], norms: list[float]) -> None:
    """metrics.jsonl against a plain loop's (pairs, 7) columns, loss, errors, sign and logit, and gradient norm of each update."""
    assert len(rows(run)) == len(tables) == 4
    for row, table, norm in zip(rows(run), tables, norms, strict=True):
        names = ("loss", "model_mse_winner", "model_mse_loser", "ref_mse_winner", "ref_mse_loser")
        expected = {**dict(zip(names, table[:, :5].mean(0).tolist(), strict=True)), "grad_norm": norm,
                    "aaf_rate": float((table[:, 5] == -1).float().mean()), "implicit_acc": float((table[:, 6] > 0).float().mean())}
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-5), (key, row["update"])


def check_kill(forks: Forks, raw: dict[str, Any], killed: Path, whole: Path) -> None:
    """A run on two ranks that is killed after its second update and resumed ends in `killed` as it did in `whole`, to the byte."""
    strike = Strike("seppo_fast.training.trainer:Trainer.report", 2, after=True)
    assert forks.run(raw, ranks=2, strike=strike).statuses == [-signal.SIGKILL] * 2
    done = forks.run(raw, "--resume", "auto", ranks=2)
    assert done.statuses == [0, 0] and "resuming from" in done.output, done.output[-2000:]
    first, resumed = ({str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}
                      for folder in (whole / "final", killed / "final"))
    assert first and first == resumed
    assert steady_rows(whole) == steady_rows(killed)


def column(run: Path, name: str) -> list[Any]:
    """One column of metrics.jsonl."""
    return [row[name] for row in rows(run)]


def write_pickapic(file: Path, count: int, ties: tuple[int, ...] = ()) -> Path:
    """Random pairs in Pick-a-Pic's columns, the second image preferred in every third; `ties` are rows with label 0.5."""
    random = np.random.default_rng(1)

    def jpg() -> bytes:
        stream = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(stream, "JPEG")
        return stream.getvalue()

    def label(row: int) -> float:
        return 0.5 if row in ties else float(row % 3 > 0)

    pq.write_table(pa.Table.from_pylist([
        {"jpg_0": jpg(), "jpg_1": jpg(), "label_0": label(row), "label_1": 1 - label(row),
         "caption": ("a red cat", "a blue dog")[row % 2]} for row in range(count)]), file)
    return file
