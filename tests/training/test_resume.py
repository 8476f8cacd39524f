"""Killed anywhere and resumed, a run ends with the same bytes in final/ as one that was never stopped.

Runs are forked from a process that has imported everything (`forked.py`), so that a chain of kills costs seconds; what only
the real processes can show (a signal from outside, DeepSpeed's launcher) is tested with them at the end.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from forked import Forks, Strike
from outcomes import steady_rows

from seppo_fast.training import checkpoint

WINDOW = "window of an iteration, scored once, lora with dropout, warm-up"
CHANGES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16 zero 2": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    "zero 3": {"zero_optimization": {"stage": 3}},
    WINDOW: {
        "seppo.sampler.window": "iteration", "seppo.reference_score": "rollout",
        "seppo.model.lora": {"rank": 2, "alpha": 4.0, "dropout": 0.2},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 2e-3, "warmup_type": "linear"}},
        "seppo.caption_dropout": 0.3, "seppo.model.gradient_checkpointing": True,
    },
}

# One run is killed at all of these in turn. The counts begin anew with each process: 4 updates of 2 micro-batches, reference
# samples in 2 batches an update. With each goes what it leaves half done in the run folder.
KILLS = {
    "sampling, before any checkpoint": (Strike("seppo_fast.reference.sampler:Sampler.draw", 2), None),
    "between two micro-batches": (Strike("seppo_fast.training.objective:Objective.__call__", 2), None),
    "between two micro-batches of the second update": (Strike("seppo_fast.training.objective:Objective.__call__", 4), None),
    "after one update": (Strike("seppo_fast.training.trainer:Trainer.report", 1, after=True), None),
    "sampling": (Strike("seppo_fast.reference.sampler:Sampler.draw", 1, after=True), None),
    "a checkpoint with a rank's share alone": (Strike("seppo_fast.training.checkpoint:save_file", 1),
                                               "checkpoints/.*.tmp/rank_0.safetensors"),
    "a checkpoint without its marker": (Strike("seppo_fast.training.checkpoint:flush_tree", 1, after=True), "checkpoints/.*.tmp"),
    "a checkpoint under its temporary name": (Strike("pathlib:Path.rename", 1), "checkpoints/.*.tmp/complete.json"),
    "a past policy under its temporary name": (Strike("seppo_fast.reference.pool:flush", 1), "pool/policy_*.tmp"),
    "a past policy without its checkpoint": (Strike("seppo_fast.reference.pool:Pool.add", 1, after=True), None),
    "the export": (Strike("seppo_fast.models.export:flush_tree", 1), ".final.tmp/*"),
}
# One rank goes through every place. The folder of two ranks looks otherwise where both write (a checkpoint) and where rank 0 alone
# does; a half-done update differs by precision, ZeRO stage and window.
OF_TWO = ("between two micro-batches", "a checkpoint with a rank's share alone", "a checkpoint without its marker",
          "a checkpoint under its temporary name", "a past policy without its checkpoint", "the export")
HALF_DONE = ("between two micro-batches of the second update", "sampling")
TORN = ("between two micro-batches of the second update", "a checkpoint without its marker")


@pytest.fixture
def tree(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`tree(name, folder, ranks=1)`: a configuration of CHANGES with a run folder of its own; two ranks share the work."""

    def make(name: str, folder: Path | str, ranks: int = 1, **more: Any) -> dict[str, Any]:
        return settings(**{
            "seppo.output_dir": str(tmp_path / folder), "seppo.checkpoint.every": 1, "train_micro_batch_size_per_gpu": 4 // ranks,
            "seppo.sampler.steps": 2, "seppo.sampler.batch_size": 4 // ranks, **CHANGES[name], **more})

    return make


@pytest.fixture
def whole(forks: Forks, tree: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`whole(name, ranks=1)`: the configuration of a run that was never stopped; each is made once."""

    def make(name: str, ranks: int = 1) -> dict[str, Any]:
        if (name, ranks) not in WHOLE:
            raw = tree(name, tmp_path_factory.mktemp("whole") / "run", ranks)
            result = forks.run(raw, ranks=ranks)
            assert result.statuses == [0] * ranks, result.output[-2000:]
            WHOLE[name, ranks] = raw
        return WHOLE[name, ranks]

    return make


WHOLE: dict[tuple[str, int], dict[str, Any]] = {}


def final_bytes(raw: dict[str, Any]) -> dict[str, bytes]:
    """Every file of final/ by name."""
    final = Path(raw["seppo"]["output_dir"]) / "final"
    return {str(file.relative_to(final)): file.read_bytes() for file in sorted(final.rglob("*")) if file.is_file()}


def metrics(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    return steady_rows(Path(raw["seppo"]["output_dir"]))


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal trained models and equal metrics."""
    files, others = final_bytes(one), final_bytes(other)
    assert files.keys() == others.keys() and len(files) > 1
    assert [name for name in files if files[name] != others[name]] == []
    assert metrics(one) == metrics(other) and [row["update"] for row in metrics(one)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("name", "ranks", "places"), [
    ("fp32", 1, KILLS), ("fp32", 2, OF_TWO), ("bf16", 1, TORN), ("bf16 zero 2", 2, TORN), (WINDOW, 1, HALF_DONE),
    (WINDOW, 2, HALF_DONE), ("zero 3", 2, TORN),
], ids=lambda value: str(value) if isinstance(value, str | int) else "")
def test_killed_at_every_turn_and_resumed(name: str, ranks: int, places: Iterable[str], forks: Forks, whole: Any,
                                          tree: Any) -> None:
    broken = tree(name, "broken", ranks)
    folder = Path(broken["seppo"]["output_dir"]) / "checkpoints"
    for place in places:
        strike, half_done = KILLS[place]
        before = [path.name for path in checkpoint.complete(folder)]
        killed = forks.run(broken, "--resume", "auto", ranks=ranks, strike=strike)
        assert killed.statuses == [-signal.SIGKILL] * ranks, f"not killed at {place}: {killed.output[-2000:]}"
        kept = [path.name for path in checkpoint.complete(folder)]
        assert kept[-1:] >= before[-1:], f"{place}: a kill took the last checkpoint away"
        assert half_done is None or list(folder.parent.glob(half_done)), f"not killed at {place}"
    done = forks.run(broken, "--resume", "auto", ranks=ranks)
    assert done.statuses == [0] * ranks, done.output[-2000:]
    assert f"resuming from {folder}" in done.output
    same(whole(name, ranks), broken)
    assert not list(Path(broken["seppo"]["output_dir"]).rglob("*.tmp")), "resuming leaves nothing of the crashes behind"


def test_both_ranks_pass_over_a_checkpoint_that_one_finds_damaged(forks: Forks, whole: Any, tree: Any) -> None:
    raw = tree("fp32", "damaged", 2)
    run = Path(shutil.copytree(whole("fp32", 2)["seppo"]["output_dir"], raw["seppo"]["output_dir"]))
    shutil.rmtree(run / "final")
    file = run / "checkpoints" / "update_00000004" / "rank_1.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    result = forks.run(raw, "--resume", "auto", ranks=2)
    assert result.statuses == [0, 0], result.output[-2000:]
    assert result.output.count(f"ignored the checkpoint {file.parent}: rank_1.safetensors is damaged") == 1
    assert result.output.count(f"resuming from {file.parent.with_name('update_00000003')}") == 1
    same(whole("fp32", 2), raw)


PLACES = {
    "sampling": Strike("seppo_fast.reference.sampler:Sampler.draw", 3, signal.SIGTERM),  # in update 1, of 0..3
    "in a window": Strike("seppo_fast.training.objective:Objective.__call__", 3, signal.SIGTERM),
    "at the end of a window": Strike("seppo_fast.training.objective:Objective.__call__", 4, signal.SIGTERM),
    "while a checkpoint is written": Strike("seppo_fast.training.checkpoint:flush_tree", 1, signal.SIGTERM),
}


@pytest.mark.parametrize(("name", "ranks", "places"), [
    (WINDOW, 1, tuple(PLACES)), ("bf16", 2, ("in a window",)), (WINDOW, 2, ("sampling",)),
], ids=lambda value: str(value) if isinstance(value, str | int) else "")
def test_stopped_by_sigterm_and_resumed(name: str, ranks: int, places: tuple[str, ...], forks: Forks, whole: Any, tree: Any,
                                        tmp_path: Path) -> None:
    for place in places:
        strike = PLACES[place]
        stopped = tree(name, "stopped", ranks, **{"seppo.checkpoint.every": 3})
        shutil.rmtree(stopped["seppo"]["output_dir"], ignore_errors=True)
        result = forks.run(stopped, ranks=ranks, strike=strike)
        assert result.statuses == [0] * ranks, f"{place}: {result.output[-2000:]}"
        assert "SIGTERM: stopping after this micro-batch, with a checkpoint" in result.output
        (named,) = re.findall(r"^stopped by SIGTERM; checkpoint: (\S+)\. Go on with --resume auto$", result.output, re.M)
        assert checkpoint.missing(Path(named)) is None
        assert not (tmp_path / "stopped" / "final").exists()
        resumed = forks.run(stopped, "--resume", "auto", ranks=ranks)
        assert resumed.statuses == [0] * ranks and f"resuming from {named}" in resumed.output
        same(whole(name, ranks), stopped)


@pytest.mark.parametrize(("signum", "ranks"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_stopped_while_the_trained_model_is_written(signum: int, ranks: int, forks: Forks, whole: Any, tree: Any) -> None:
    stopped = tree("fp32", "stopped", ranks, **{"seppo.checkpoint.every": 3})  # not at the last update's turn
    folder = Path(stopped["seppo"]["output_dir"])
    result = forks.run(stopped, ranks=ranks, strike=Strike("seppo_fast.models.export:flush_tree", 1, signum))
    assert result.status == (130 if signum == signal.SIGINT else 0), result.output[-2000:]
    name = signal.Signals(signum).name
    (named,) = re.findall(rf"^stopped by {name} while final/ was written; checkpoint: (\S+)\. Go on with --resume auto$",
                          result.output, re.M)
    assert named == str(folder / "checkpoints" / "update_00000004") and checkpoint.missing(Path(named)) is None
    assert "done" not in result.output and "Traceback" not in result.output and "seppo_fast:" not in result.output
    assert [file.name for file in folder.glob("*final*")] == []
    assert forks.run(stopped, "--resume", "auto", ranks=ranks).statuses == [0] * ranks
    same(whole("fp32", ranks), stopped)


def test_a_signal_does_not_wait_for_a_grid(forks: Forks, whole: Any, tree: Any) -> None:
    stopped = tree("fp32", "stopped", 2, **{"seppo.samples.every": 4})
    samples = Path(stopped["seppo"]["output_dir"]) / "samples"
    result = forks.run(stopped, ranks=2, strike=Strike("seppo_fast.training.samples:Grids.write", 1, signal.SIGTERM))
    assert result.statuses == [0, 0] and result.output.count("stopped by SIGTERM; checkpoint: ") == 1, result.output[-2000:]
    assert not list(samples.glob("*.png"))
    assert forks.run(stopped, "--resume", "auto", ranks=2).statuses == [0, 0]
    assert [file.name for file in sorted(samples.iterdir())] == ["update_00000000.png", "update_00000004.png"]
    same(whole("fp32", 2), stopped)


def test_unused_reference_samples_are_in_the_checkpoint(forks: Forks, tree: Any, tmp_path: Path) -> None:
    raw = tree(WINDOW, "run")
    result = forks.run(raw, strike=Strike("seppo_fast.training.trainer:Trainer.report", 1, signal.SIGTERM))
    assert result.status == 0
    (left,) = checkpoint.complete(tmp_path / "run" / "checkpoints")
    assert left.name == "update_00000001_00000008", "8 of the iteration's 16 reference samples are used up"
    # The rest of the iteration needs no sampling: dying at the first sample is dying in iteration 2.
    killed = forks.run(raw, "--resume", "auto", strike=Strike("seppo_fast.reference.sampler:Sampler.draw", 1))
    assert killed.status == -signal.SIGKILL and [row["update"] for row in metrics(raw)] == [1, 2]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_stops_at_once(signum: int, forks: Forks, tree: Any, tmp_path: Path) -> None:
    raw = tree("fp32", "run", **{"seppo.data.cache_dir": str(tmp_path / "cache")})
    for ranks in (1, 2):
        result = forks.run(raw, ranks=ranks, strike=Strike("seppo_fast.data.cache:encoded", 1, signum))
        assert result.status == (130 if signum == signal.SIGINT else 0)
        name = signal.Signals(signum).name
        assert result.output.count(f"stopped by {name} before training began; what is cached is kept") == 1
        assert "Traceback" not in result.output and "seppo_fast:" not in result.output
    assert forks.run(raw).status == 0, "nothing to lose there: no --resume needed"


def test_a_finished_run_resumed_stays_as_it_is_and_goes_on_with_more_iterations(
        forks: Forks, tree: Any) -> None:
    longer, first = tree("fp32", "longer", **{"seppo.iterations": 3}), tree("fp32", "first")
    assert forks.run(longer).status == forks.run(first).status == 0
    before = final_bytes(first)
    assert forks.run(first, "--resume", "auto").status == 0
    assert final_bytes(first) == before
    first["seppo"]["iterations"] = 3
    assert forks.run(first, "--resume", "auto").status == 0
    assert metrics(first) == metrics(longer) and len(metrics(first)) == 6
    assert final_bytes(first) == final_bytes(longer)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 90) -> None:
    """Until `condition` holds; fails when the process ends or the time is up before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def rows(raw: dict[str, Any]) -> int:
    path = Path(raw["seppo"]["output_dir"]) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_signal_from_outside(forks: Forks, whole: Any, tree: Any, start: Any) -> None:
    """SIGTERM to the process that a person or a scheduler sees; SIGINT then is the same but for its status."""
    stopped = tree("bf16", "stopped")
    process = start(stopped)
    wait_for(lambda: rows(stopped) >= 1, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-2000:]
    (named,) = re.findall(r"^stopped by SIGTERM; checkpoint: (\S+)\.", errors, re.M)
    assert checkpoint.missing(Path(named)) is None
    strike = Strike("seppo_fast.training.objective:Objective.__call__", 1, signal.SIGINT)
    result = forks.run(stopped, "--resume", "auto", strike=strike)
    assert result.status == 130, result.output[-2000:]
    (named,) = re.findall(r"^stopped by SIGINT; checkpoint: (\S+)\.", result.output, re.M)
    assert checkpoint.missing(Path(named)) is None
    assert forks.run(stopped, "--resume", "auto").status == 0
    same(whole("bf16"), stopped)


def test_ctrl_c_with_the_launcher(forks: Forks, whole: Any, tree: Any, start: Any) -> None:
    """The terminal signals the whole foreground group; the launcher then ends the ranks and exits with 1, its own choice.

    Then SIGKILL, for which it makes no difference who started the group.
    """
    stopped = tree("fp32", "stopped", 2)
    process = start(stopped, ranks=2)
    wait_for(lambda: rows(stopped) >= 1, process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    (named,) = re.findall(r"^stopped by SIGINT; checkpoint: (\S+)\.", errors, re.M)
    assert checkpoint.missing(Path(named)) is None
    before = rows(stopped)
    assert before < 4, "it was not stopped, it was done"

    strike = Strike("seppo_fast.training.trainer:Trainer.report", 1, after=True)
    killed = forks.run(stopped, "--resume", "auto", ranks=2, strike=strike)
    assert killed.statuses == [-signal.SIGKILL] * 2 and rows(stopped) > before
    assert forks.run(stopped, "--resume", "auto", ranks=2).statuses == [0, 0]
    same(whole("fp32", 2), stopped)
