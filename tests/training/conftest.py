"""Runs in this process, made once a module for each different configuration; an improvement model for the second stage; Wan."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def finished() -> dict[str, Path]:
    """Run folders by configuration."""
    return {}


@pytest.fixture
def trained(settings: Callable[..., dict[str, Any]], train: Callable[..., Path], finished: dict[str, Path],
            tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained(**{"seppo.beta": 10.0})` is the folder of a finished run of `settings` with these changes."""

    def once(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in finished:
            folder = tmp_path_factory.mktemp("runs") / "run"
            finished[key] = train(settings(**{"seppo.output_dir": str(folder), **changes}))
        return finished[key]

    return once


@pytest.fixture(scope="session")
def improvement(tmp_path_factory: pytest.TempPathFactory, sd: Path) -> Path:
    """An improvement model with the encoders of the policy's model."""
    from tiny import tiny_improvement

    return tiny_improvement(tmp_path_factory.mktemp("models") / "improvement", sd)


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.1 of one block."""
    from tiny_wan import tiny_wan

    return tiny_wan(tmp_path_factory.mktemp("models") / "wan", num_layers=1)


@pytest.fixture(scope="session")
def wan_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of six VP9 clips of 4 to 14 frames: of the first, one frame comes twice where five are wanted."""
    from data.video_files import pictures, write_csv, write_video

    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        write_video(folder / f"clip{i}.webm", pictures(4 + 2 * i, 40, 36 + 2 * i, seed=i))
    return write_csv(folder / "clips.csv", [(f"clip{i}", ("a red cat", "the sky and a dog")[i % 2], 1) for i in range(6)])


@pytest.fixture
def of_wan(settings: Callable[..., dict[str, Any]], wan: Path, wan_clips: Path) -> Callable[..., dict[str, Any]]:
    """`of_wan(**changes)`: SePPO on clips of five frames, 2 iterations of 2 updates of 4 pairs; clips are cached."""
    return lambda **changes: settings(**{
        "optimizer.params": {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.01, "torch_adam": True}, "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2, "seppo.seed": 1, "seppo.beta": 100.0, "seppo.model.path": str(wan),
        "seppo.sampler.solver": "unipc", "seppo.data.source": str(wan_clips), "seppo.data.resolution": 32,
        "seppo.data.video": {"frames": 5, "choice": "uniform"}, "seppo.data.workers": 2, "seppo.data.flip": False,
        "seppo.data.cache_dtype": "float32", "seppo.checkpoint.every": 1, **changes})
