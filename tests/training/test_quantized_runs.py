"""Whole runs of a LoRA over a base in 8 or 4 bits: near to plain ones, with a plain LoRA at the end; ranks and resuming."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from forked import Forks, Strike
from outcomes import rows, steady_rows
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_sd3

from seppo_fast.errors import UserError
from seppo_fast.models.quantize import is_quantized
from seppo_fast.training.trainer import Trainer

# How far the losses and errors of a run's rows may be from the plain run's, relative; 0.00015, 0.0017 and 0.0075 were seen.
DISTANCE = {"int8": 0.002, "fp8": 0.01, "nf4": 0.03}
kinds = pytest.mark.parametrize("kind", DISTANCE)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 64, nf4's blocks."""
    return tiny_sd3(tmp_path_factory.mktemp("models") / "sd3", num_layers=1, attention_head_dim=32, caption_projection_dim=64)


@pytest.fixture
def configured(settings: Callable[..., dict[str, Any]], sd3: Path) -> Callable[..., dict[str, Any]]:
    return lambda **changes: settings(**{
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "seppo.beta": 100.0, "seppo.model.path": str(sd3),
        "seppo.model.lora": {"rank": 2, "alpha": 4.0}, "seppo.sampler.solver": "euler", "seppo.checkpoint.every": 1, **changes})


@pytest.fixture(scope="module")
def plain() -> list[Path]:
    """The run without quantization, once it is made."""
    return []


@kinds
def test_losses_are_near_to_the_plain_runs_and_the_base_is_shared(kind: str, configured: Any, train: Callable[..., Path],
                                                                  plain: list[Path], monkeypatch: pytest.MonkeyPatch,
                                                                  tmp_path_factory: pytest.TempPathFactory) -> None:
    if not plain:
        plain.append(train(configured(**{"seppo.output_dir": str(tmp_path_factory.mktemp("plain") / "run")})))
    trainers, loop = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: (trainers.append(self), loop(self)))
    run = train(configured(**{"seppo.model.quantize": kind, "seppo.samples": {"every": 2, "prompts": ["a red cat"]}}))
    assert len(rows(run)) == len(rows(plain[0])) == 4
    for row, other in zip(rows(run), rows(plain[0]), strict=True):
        for name in ("loss", "model_mse_winner", "model_mse_loser", "ref_mse_winner", "ref_mse_loser"):
            assert row[name] == pytest.approx(other[name], rel=DISTANCE[kind]), (name, row["update"])
    assert rows(run)[0]["ref_mse_winner"] != rows(plain[0])[0]["ref_mse_winner"], "nothing was quantized"
    policy, reference = (dict(network.named_parameters()) for network in
                         (trainers[0].engine.module, trainers[0].reference.module))
    assert any(map(is_quantized, policy.values()))
    assert all((reference[name] is weight) == (not weight.requires_grad) for name, weight in policy.items())
    assert len([*(run / "samples").iterdir()]) > 1
    with safe_open(next((run / "checkpoints").iterdir()) / "policy.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())


@pytest.mark.parametrize(("kind", "engine"), [
    ("nf4", {"bf16": {"enabled": True}}), ("fp8", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}})])
def test_the_lora_goes_on_the_model_as_it_was(kind: str, engine: dict[str, Any], configured: Any, train: Callable[..., Path],
                                              sd3: Path) -> None:
    run = train(configured(**{"seppo.model.quantize": kind, "seppo.model.quantize_text": "int8", **engine}))
    assert sorted(path.name for path in (run / "final").iterdir()) == ["README.md", "pytorch_lora_weights.safetensors"]
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3)
    pipeline.load_lora_weights(run / "final")
    policy = load_file(max((run / "checkpoints").iterdir()) / "policy.safetensors")
    loaded = dict(pipeline.transformer.named_parameters())
    for name, weight in policy.items():
        ours = loaded[name.replace(".default.", ".default_0.")]
        assert torch.equal(ours, weight.to(ours.dtype)), name
    assert not any(map(is_quantized, loaded.values()))


@pytest.mark.parametrize(("kind", "engine"), [
    ("int8", {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}), ("nf4", {})])
def test_ranks_and_a_kill_change_nothing(kind: str, engine: dict[str, Any], configured: Any, forks: Forks, tmp_path: Path) -> None:
    whole, killed = (configured(**{"seppo.output_dir": str(tmp_path / folder), "seppo.model.quantize": kind, **engine})
                     for folder in ("whole", "killed"))
    assert forks.run(whole, ranks=2).statuses == [0, 0]
    strike = Strike("seppo_fast.training.trainer:Trainer.report", 2, after=True)
    assert forks.run(killed, ranks=2, strike=strike).statuses == [-signal.SIGKILL] * 2
    done = forks.run(killed, "--resume", "auto", ranks=2)
    assert done.statuses == [0, 0] and "resuming from" in done.output, done.output[-2000:]
    one, other = ((tmp_path / folder / "final" / "pytorch_lora_weights.safetensors").read_bytes() for folder in ("whole", "killed"))
    assert one == other and steady_rows(tmp_path / "whole") == steady_rows(tmp_path / "killed")
    names = load_file(max((tmp_path / "whole" / "checkpoints").iterdir()) / "rank_1.safetensors").keys()
    assert names and all("lora_" in name for name in names), "nothing of the base"


def test_a_run_goes_on_with_the_same_base_alone(configured: Any, train: Callable[..., Path]) -> None:
    train(configured(**{"seppo.model.quantize": "int8"}))
    with pytest.raises(UserError, match="seppo.model.quantize: 'int8' there, None now"):
        train(configured(**{"seppo.iterations": 3}), resume="auto")


def test_embeddings_of_quantized_encoders_have_a_cache_of_their_own(configured: Any, train: Callable[..., Path], tmp_path: Path
                                                                    ) -> None:
    """The same embeddings come from a cache and without one."""
    found = []
    for name, changes in (("plain", {}), ("cached", {"seppo.model.quantize_text": "nf4"}),
                          ("held", {"seppo.model.quantize_text": "nf4", "seppo.data.cache_prompts": False})):
        cache = tmp_path / ("other" if name == "held" else "cache")
        run = train(configured(**{"seppo.data.cache_dir": str(cache), "seppo.output_dir": str(tmp_path / name),
                                  "seppo.iterations": 1, **changes}))
        found.append(steady_rows(run))
    assert found[0] != found[1] == found[2]
    assert len([*(tmp_path / "cache").iterdir()]) == 2
