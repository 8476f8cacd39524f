"""Runs in this process, made once a module for each different configuration; an improvement model for the second stage."""

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
