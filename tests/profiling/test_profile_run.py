"""`python -m seppo_fast.profile_run` on a tiny model, and its advice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forks
from tiny import tiny_flux, tiny_improvement, tiny_sd3

from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.errors import UserError
from seppo_fast.lock import locked
from seppo_fast.profiling.profiled import Clock, profile
from seppo_fast.profiling.report import PHASES, advice
from seppo_fast.reference.improver import Improver
from seppo_fast.signals import StopSignals
from seppo_fast.training.folder import LOCK


def test_a_run_is_profiled_and_leaves_nothing_but_the_cache(settings: Callable[..., dict[str, Any]], ranks: Any, train: Any,
                                                            tmp_path: Path) -> None:
    """Beside a run of the same configuration, whose folder it leaves alone."""
    run = tmp_path / "run"
    run.mkdir()
    before = set(tmp_path.iterdir())
    raw = settings(**{"seppo.checkpoint.every": 1, "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv")},
                      "seppo.samples.every": 1})
    with locked(run / LOCK):
        text = profile(parse_config(raw), ranks, StopSignals(), updates=1)
        assert [file.name for file in run.iterdir()] == [LOCK]
    assert "mean of 1 updates of 8 pairs on 1 rank," in text
    shares = {name: float(line.split("%")[0].split()[-1]) for line in text.splitlines() for name in PHASES
              if line.startswith(f"  {name} ")}
    assert {"sampling", "data", "policy forward", "reference scoring", "backward", "optimizer step"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert "sampling, 8 samples in one batch: " in text and "training, 4 pairs in one micro-batch" in text
    assert ("the GPU waits for the host" in text) == torch.cuda.is_available()
    assert "aten::mkldnn_convolution" in text and "convolution_backward" in text
    for name, worth in (("sampling", 30), ("reference scoring", 5)):  # which advice there is depends on the times
        assert (f"\n- {name} is " in text) == (shares[name] > worth), name
    assert set(tmp_path.iterdir()) == before, "the run folder, the monitors' or the temporary one is still there"


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_methods_without_reference_samples(settings: Callable[..., dict[str, Any]], ranks: Any, train: Any, pickapic: Path,
                                           method: str) -> None:
    raw = settings(**{"seppo.method": method, "seppo.data.source": str(pickapic), "train_micro_batch_size_per_gpu": 8})
    text = profile(parse_config(raw), ranks, StopSignals(), updates=1)
    assert "sampling" not in text and ("reference scoring" in text) == (method == "dpo")
    assert "training, 8 pairs in one micro-batch" in text


def test_an_improvement_model_is_profiled(settings: Callable[..., dict[str, Any]], ranks: Any, train: Any, pickapic: Path) -> None:
    raw = settings(**{"seppo.method": "improvement", "seppo.data.source": str(pickapic), "train_micro_batch_size_per_gpu": 8})
    text = profile(parse_config(raw), ranks, StopSignals(), updates=1)
    assert "sampling" not in text and "training, 8 pairs in one micro-batch" in text


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_flows_are_profiled(make: Callable[[Path], Path], settings: Callable[..., dict[str, Any]], ranks: Any, train: Any,
                            tmp_path: Path) -> None:
    raw = settings(**{"seppo.model.path": str(make(tmp_path / "model")), "seppo.model.lora": {"rank": 2},
                      "seppo.sampler.solver": "euler", "seppo.data.cache_dir": str(tmp_path / "cache")})
    text = profile(parse_config(raw), ranks, StopSignals(), updates=1)
    assert "sampling, 8 samples in one batch: " in text and "training, 4 pairs in one micro-batch" in text
    assert "aten::" in text, "the operators that take the most time; which they are depends on the machine"


def test_of_samples_that_are_used_again_each_pair_has_a_share(settings: Callable[..., dict[str, Any]], ranks: Any, train: Any,
                                                              sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    improve = Improver.improve
    monkeypatch.setattr(Improver, "improve", lambda self, *given: drawn.append(len(given[0])) or improve(self, *given))
    raw = settings(**{"seppo.method": "iterative_dpo", "seppo.sampler.samples_per_iteration": 40, "seppo.sampler.batch_size": 4,
                      "seppo.updates_per_iteration": 1000, "seppo.improvement.offload": True,
                      "seppo.improvement.path": str(tiny_improvement(tmp_path / "improvement", sd))})
    text = profile(parse_config(raw), ranks, StopSignals(), updates=1)
    assert drawn == [4] * 7, "two batches an update in three updates, and one under the profiler; no set for an iteration"
    assert "a sample is used 200 times (sampler.samples_per_iteration): of the time of drawing one for each pair, 0.005 is" in text
    assert 0 < float(text.split("  sampling ")[1].split("%")[0]) < 10 and "sampling, 4 samples in one batch: " in text
    assert "reference_score" not in text, "which does not go with this method"


def test_scores_of_a_rollout_are_told_from_its_samples(settings: Callable[..., dict[str, Any]], ranks: Any, train: Any) -> None:
    text = profile(parse_config(settings(**{"seppo.reference_score": "rollout"})), ranks, StopSignals(), updates=1)
    assert "  sampling  " in text and "  reference scoring  " in text


def test_two_ranks(settings: Callable[..., dict[str, Any]], forks: Forks, tmp_path: Path) -> None:
    raw = settings(**{"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2})
    done = forks.run(raw, "--updates", "1", ranks=2, module="seppo_fast.profile_run")
    assert done.statuses == [0, 0], done.output[-3000:]
    assert done.output.count("where a second goes: mean of 1 updates of 8 pairs on 2 ranks") == 1
    assert "the slowest rank samples" in done.output
    assert "collectives: about 0.0% of an update" not in done.output and "collectives: about" in done.output
    assert "- ZeRO stage 2 communicates in every one of 2 micro-batches" in done.output
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "run").exists()


def test_a_mistake_is_told_before_anything_runs(settings: Callable[..., dict[str, Any]], forks: Forks) -> None:
    mistyped = "seppo.sampler.stps: unknown key; did you mean seppo.sampler.steps?"
    for arguments, words in ((["--updates", "0"], "--updates 0: at least one"), (["--set", "seppo.sampler.stps=3"], mistyped)):
        done = forks.run(settings(), *arguments, module="seppo_fast.profile_run")
        assert done.status == 2 and "Traceback" not in done.output
        assert words in done.output


def test_a_folder_that_cannot_be_written_is_named(settings: Callable[..., dict[str, Any]], ranks: Any, train: Any) -> None:
    with pytest.raises(UserError, match="seppo.output_dir: no temporary folder can be made in /proc"):
        profile(parse_config(settings(**{"seppo.output_dir": "/proc/run"})), ranks, StopSignals(), updates=1)


def test_the_clock_takes_an_inner_phase_out_of_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr("seppo_fast.profiling.profiled.time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    clock.enter("sampling")
    clock.timed(lambda: None, "data")()
    clock.leave()
    clock.charge()
    spent = {name: value for name, value in clock.seconds.items() if value}
    assert spent == {"other": 1.0 + 16.0, "sampling": 2.0 + 8.0, "data": 4.0}


def advised(settings: Callable[..., dict[str, Any]], seconds: dict[str, float], cuda: bool = True, world: int = 1,
            in_collectives: float = 0.0, **changes: Any) -> str:
    config = parse_config(settings(**changes))
    return "\n".join(advice(seconds, config, batch_plan(config.deepspeed, world), cuda, in_collectives))


SAMPLING = {"sampling": 9.0, "policy forward": 0.5, "backward": 0.5}


def test_advice_follows_what_was_measured(settings: Callable[..., dict[str, Any]]) -> None:
    slow = advised(settings, SAMPLING, **{"seppo.sampler.cuda_graph": False, "seppo.sampler.steps": 50})
    assert "sampling is 90%: seppo.sampler.cuda_graph is off" in slow
    assert "solver dpmsolver++ at 20 steps instead of ddim at 50 would cut it by 60% (changes the samples)" in slow
    assert "cuda_graph" not in advised(settings, SAMPLING, cuda=False, **{"seppo.sampler.cuda_graph": False})
    assert "batches of 2 where a rank has 8 samples" in advised(settings, SAMPLING, **{"seppo.sampler.batch_size": 2})
    policy = {"sampling": 1.0, "policy forward": 3.0, "backward": 6.0}
    assert "gradient_checkpointing" in advised(settings, policy, **{"seppo.model.gradient_checkpointing": True})
    assert "gradient_checkpointing" not in advised(settings, SAMPLING, **{"seppo.model.gradient_checkpointing": True})
    assert "data is 50%" in advised(settings, {"data": 1.0, "sampling": 1.0})
    offloaded = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    assert "moves it to the CPU" in advised(settings, {"optimizer step": 1.0, "sampling": 1.0}, **offloaded)
    compiled = {"seppo.sampler.compile": "regional"}
    assert "fuse_projections" in advised(settings, SAMPLING, **compiled)
    assert "fuse_projections" not in advised(settings, SAMPLING, **compiled, **{"seppo.model.lora": {"rank": 4}})
    assert "collectives are 30%" in advised(settings, SAMPLING, world=2, in_collectives=0.3)


def test_no_advice_where_there_is_none(settings: Callable[..., dict[str, Any]]) -> None:
    best = {"seppo.sampler.compile": "regional", "seppo.sampler.fuse_projections": True, "seppo.model.channels_last": True,
            "seppo.model.compile": "regional", "seppo.sampler.batch_size": "auto"}
    assert advised(settings, SAMPLING, **best) == "nothing that this program could turn on stands out"
