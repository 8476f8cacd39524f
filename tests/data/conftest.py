"""A tiny model, opened once."""

from pathlib import Path

import pytest

from seppo_fast.models import StableDiffusion, open_model


@pytest.fixture(scope="session")
def model(sd: Path) -> StableDiffusion:
    return open_model(str(sd))
