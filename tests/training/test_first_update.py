"""What a run's first lines say: the loss's backend, that the first pairs are ties, threads that are too many."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import rows

from seppo_fast import machine
from seppo_fast.machine import cores, too_many_threads
from seppo_fast.ops import available_backends
from seppo_fast.training.networks import loss_backend

TIES = "policy and reference are still equal, so all pairs are ties"


@pytest.mark.parametrize(("method", "flips"), [("seppo", True), ("spin", False), ("sft", False)])
def test_ties_are_said_once_and_the_rate_is_a_flippers(method: str, flips: bool, train: Any, settings: Any,
                                                       capfd: pytest.CaptureFixture[str]) -> None:
    """Each iteration of SPIN begins with ties."""
    run = train(settings(**{"seppo.method": method}))
    said = capfd.readouterr()
    assert said.out.count(TIES) == (method != "sft")
    if method != "sft":
        line = next(line for line in said.out.splitlines() if TIES in line)
        assert line.startswith("update 1: ") and "loss 0.6931 is log 2" in line and ("aaf 1.00" in line) == flips
        assert rows(run)[0]["logit_p95"] == 0
    assert all(("aaf_rate" in row) == flips for row in rows(run))
    assert ("aaf=" in said.err) == flips and ("acc=" in said.err) == (method != "sft")
    assert (f"loss: {loss_backend(torch.device('cpu'))}" in said.out) == (method != "sft")


def test_ties_with_an_sft_weight(train: Any, settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Their loss is no longer log 2."""
    [row] = rows(train(settings(**{"seppo.sft_weight": 0.5, "seppo.iterations": 1, "seppo.updates_per_iteration": 1})))
    assert row["loss"] == pytest.approx(math.log(2) + 0.5 * row["model_mse_winner"], rel=1e-6)
    assert f"loss {row['loss']:.4f} is log 2 and what sft_weight adds, acc 0.00" in capsys.readouterr().out


def test_the_backend_is_the_one_that_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(name for name, state in available_backends("cpu").items() if state == "available")
    assert loss_backend(torch.device("cpu")).startswith(f"{first} backend")
    states = {"native": "_cuda.so is not built", "triton": "available", "reference": "available"}
    monkeypatch.setattr("seppo_fast.training.networks.available_backends", lambda device: states)
    assert loss_backend(torch.device("cuda")) == "triton backend (no native: _cuda.so is not built)"


@pytest.mark.parametrize(("ranks", "threads", "of", "each"), [(1, 2, 2, None), (2, 1, 2, None), (8, 64, 64, 8), (2, 2, 2, 1),
                                                              (4, 1, 2, 1)])
def test_threads_that_wait_for_one_another(ranks: int, threads: int, of: int, each: int | None) -> None:
    said = too_many_threads(ranks, threads, of)
    assert said == "" if each is None else f"set OMP_NUM_THREADS={each} before the command" in said


def test_a_run_with_too_many_threads_says_so(train: Any, settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(cores() + 1)
    try:
        train(settings(**{"seppo.iterations": 1, "seppo.updates_per_iteration": 1}))
    finally:
        torch.set_num_threads(before)
    assert re.search(rf"^1 rank of {cores() + 1} threads share {cores()} core", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(("quota", "most"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None), ("", None)])
def test_a_containers_quota_counts(quota: str, most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "missing")
    free = cores()
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    assert cores() == (free if most is None else min(free, most))
