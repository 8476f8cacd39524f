"""Runs of both stages that are killed, or shared by two ranks: the same model comes out, and nothing is drawn twice."""

from pathlib import Path

import pytest
import torch
from forked import Strike
from outcomes import apart, identical, steady_rows, weights
from safetensors.torch import load_file

DRAW, ADD = "seppo_fast.reference.sampler:Sampler.draw", "seppo_fast.training.rollouts:SampleSet.add"
# One run is killed at all of these in turn: what is drawn for an iteration, and where it goes on.
KILLS = {
    "a loser, before any checkpoint": Strike(DRAW, 1),
    "a winner": Strike(DRAW, 2),
    "a file of samples under its temporary name": Strike("seppo_fast.training.rollouts:follow_umask", 1),
    "between two files of samples": Strike(ADD, 1, after=True),
    "after an update on the set": Strike("seppo_fast.training.trainer:Trainer.report", 1, after=True),
    "a past policy without its checkpoint": Strike("seppo_fast.reference.pool:Pool.add", 1, after=True),
    "the next iteration's set": Strike(ADD, 2, after=True),
    "the removal of old sets": Strike("seppo_fast.training.rollouts:SampleSet.remove_old", 1),
}


@pytest.fixture
def stage_two(settings, improvement, tmp_path):
    """`stage_two(folder, **changes)`: 8 samples an iteration, in batches of 3 and 2 or, on two ranks, of 2, used twice."""
    return lambda folder, ranks=1, **changes: settings(**{
        "seppo.method": "iterative_dpo", "seppo.improvement": {"path": str(improvement)},
        "seppo.output_dir": str(tmp_path / folder),
        "seppo.sampler": {"steps": 2, "batch_size": 4 // ranks, "guidance_scale": 2.0, "samples_per_iteration": 8},
        "train_micro_batch_size_per_gpu": 4 // ranks, "seppo.checkpoint.every": 1, **changes})


@pytest.mark.parametrize("ranks", [1, 2])
def test_stage_two_killed_anywhere_ends_with_the_same_bytes(ranks, stage_two, forks):
    whole, broken = stage_two("whole", ranks), stage_two("broken", ranks)
    assert forks.run(whole, ranks=ranks).statuses == [0] * ranks
    for place, strike in KILLS.items():
        killed = forks.run(broken, "--resume", "auto", ranks=ranks, strike=strike)
        assert any(killed.statuses), f"{place}: not reached\n{killed.output[-2000:]}"
    done = forks.run(broken, "--resume", "auto", ranks=ranks)
    assert done.statuses == [0] * ranks, done.output[-3000:]
    one, other = (Path(raw["seppo"]["output_dir"]) for raw in (whole, broken))
    for file in sorted((one / "final").rglob("*")):
        assert file.is_dir() or file.read_bytes() == (other / file.relative_to(one)).read_bytes(), file
    assert steady_rows(one) == steady_rows(other) and len(steady_rows(one)) == 4
    files = sorted(file.relative_to(one) for file in (one / "rollouts").rglob("*.*"))
    assert files and files == sorted(file.relative_to(other) for file in (other / "rollouts").rglob("*.*"))
    for file in files:  # they differ by the run's name alone
        assert identical(load_file(one / file), load_file(other / file)), file
    kept = [file.name for file in (one / "checkpoints" / "update_00000003").iterdir()]
    assert "rank_0.safetensors" in kept and not any("rollouts" in name for name in kept), "a checkpoint copies samples"


def test_a_set_goes_with_its_last_checkpoint(stage_two, train):
    run = train(stage_two("run", **{"seppo.checkpoint.keep_last": 1, "seppo.iterations": 3}))
    assert [path.name for path in sorted((run / "rollouts").iterdir())] == []
    kept = train(stage_two("kept", **{"seppo.checkpoint.keep_last": 2, "seppo.iterations": 3}))
    assert [path.name for path in sorted((kept / "rollouts").iterdir())] == ["iteration_00003"]


def test_what_is_drawn_is_not_drawn_again(stage_two, forks):
    raw = stage_two("run")
    forks.run(raw, strike=Strike("seppo_fast.training.trainer:Trainer.report", 1, after=True))
    folder = Path(raw["seppo"]["output_dir"]) / "rollouts" / "iteration_00001"
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(before) == 2
    done = forks.run(raw, "--resume", "auto", strike=Strike("seppo_fast.training.trainer:Trainer.report", 1, after=True))
    assert any(done.statuses)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


@pytest.mark.parametrize("method", ["improvement", "iterative_dpo"])
def test_two_ranks_train_the_model_of_one(method, settings, stage_two, train, train_on_ranks, pickapic, tmp_path):
    steady = {"optimizer.params.eps": 1e-5, "seppo.beta": 30.0}
    if method == "improvement":
        make = lambda folder, ranks: settings(**steady, **{  # noqa: E731
            "seppo.method": method, "seppo.data.source": str(pickapic), "seppo.output_dir": str(tmp_path / folder),
            "train_micro_batch_size_per_gpu": 4 // ranks})
    else:
        make = lambda folder, ranks: stage_two(folder, ranks, **steady)  # noqa: E731
    (two,) = train_on_ranks([make("two", 2)])
    one = train(make("one", 1))
    assert apart(weights(one), weights(two)) < 5e-6
    for a, b in zip(steady_rows(one), steady_rows(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert torch.isclose(torch.tensor(a["grad_norm"]), torch.tensor(b["grad_norm"]), rtol=1e-3)
