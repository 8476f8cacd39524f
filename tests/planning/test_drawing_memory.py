"""The plan's bytes of drawing with guidance against what the CPU allocates for the real sampler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import CLOSE, allocated
from tiny_qwen import tiny_qwen
from tiny_wan import tiny_wan

from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.models import open_model
from seppo_fast.models.lora import add_lora
from seppo_fast.models.trial import blank_conditions
from seppo_fast.planning.cost import estimate
from seppo_fast.reference import Sampler
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import table_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("make", [tiny_wan, tiny_qwen])
def test_drawing_with_guidance_is_what_the_cpu_allocates(make: Callable[..., Path], tmp_path: Path,
                                                         settings: Callable[..., dict[str, Any]]) -> None:
    """With a LoRA and two branches; checkpoints change nothing where there are no gradients."""
    changes = {"seppo.model.path": str(make(tmp_path / "model", num_layers=3)), "seppo.data.source": None,
               "seppo.data.resolution": 32, "seppo.data.video": {"frames": 5}, "seppo.model.lora": {"rank": 4},
               "seppo.model.gradient_checkpointing": True, "bf16": {"enabled": True}, "seppo.sampler.batch_size": 16,
               "seppo.sampler.solver": "euler", "seppo.sampler.steps": 4}
    config = parse_config(settings(**changes))
    model, sampler = open_model(config.seppo.model.path, frames=5), config.seppo.sampler
    shape = model.latent_shape(32, 5)
    network = model.load_denoiser(torch.bfloat16).eval()
    add_lora(network, config.seppo.model.lora, 0)
    conditions = blank_conditions(model, torch.zeros(16, *shape, dtype=torch.bfloat16))
    empty = {name: value[:1] for name, value in conditions.items()}
    denoise, guidance = guided(model, sampler.guidance_scale, empty)
    table = table_of(model, "euler", 4, shape)
    drawer = Sampler(network, denoise, table, empty, guidance, sampler, torch.bfloat16)
    noise = torch.zeros(16, *shape)
    real = allocated(lambda: drawer.draw(noise, conditions))
    assert len(guidance) == 2
    assert estimate(model, config, batch_plan(config.deepspeed, 1)).sampler == pytest.approx(real, rel=CLOSE)
