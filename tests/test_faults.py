"""A short part of `python -m tests.faults`, always the same; and that the program sees what is wrong."""

import functools
import importlib
import random
from pathlib import Path

import pytest
from faults.kinds import AREAS, KINDS
from faults.program import Tally, play
from faults.runs import Bench, difference
from forked import Forks


@pytest.fixture(scope="module")
def bench(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), forks)


def test_what_faults_leave_comes_to_the_same_end(bench: Bench, tmp_path: Path) -> None:
    """With this seed the kill comes in the middle of a checkpoint, and the two runs begin at once, so that they meet."""
    kinds = ["SIGKILL: an fsync or a rename", "two runs in one folder", "damaged: every checkpoint",
             "damaged: the newest checkpoint"]
    tally = Tally()
    run = bench.run("fp32", 1, tmp_path / "case", random.Random(14))
    wrong = play(run, kinds, tally)
    assert wrong is None, wrong
    assert {kind: (row.equal, row.refused) for kind, row in tally.rows.items()} == dict.fromkeys(kinds, (1, 0)) | {kinds[2]: (0, 1)}


def test_the_program_sees_other_bytes_and_doubled_rows(bench: Bench) -> None:
    plain, folder = bench.plain("fp32", 1), bench.folder / "plain" / "fp32 1"  # a copy's card would name the other folder
    assert difference(folder, plain) is None
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() * 2)
    assert "rows of updates [1, 2, 3, 4, 1, 2, 3, 4]" in difference(folder, plain)
    grid = folder / "samples" / "update_00000002.png"
    grid.unlink()
    assert difference(folder, plain) == "other bytes, or no file, in samples/update_00000002.png"


@pytest.mark.parametrize("function", sorted({function for area in AREAS.values() for function, *_ in area if function}))
def test_every_place_is_there(function: str) -> None:
    module, _, path = function.partition(":")
    assert callable(functools.reduce(getattr, path.split("."), importlib.import_module(module)))


def test_the_table_counts_each_fault_once() -> None:
    tally = Tally()
    first, second, *_ = KINDS
    tally.add(first, 2.0, equal=1)
    tally.add(first, 1.0, refused=1)
    tally.add(second, 61.0, wrong=1)
    assert tally.table().splitlines()[2:] == [
        f"| {first} | 2 | 1 | 1 | 0 | 2.0 |", f"| {second} | 1 | 0 | 0 | 1 | 61.0 |", "| all | 3 | 1 | 1 | 1 | 61.0 |"]
