"""What cheap rollouts cost by the plan: the adapter's bytes, its FLOPs, what is kept, and grids that are drawn otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import CLOSE, allocated
from safetensors.torch import load_file
from training.adapter_files import write_lora

from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.models import open_model
from seppo_fast.models.trial import blank_conditions
from seppo_fast.planning.cost import Cost, estimate
from seppo_fast.reference import Sampler
from seppo_fast.reference.adapter import beside
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import rollout_table
from seppo_fast.training.adapter import adapted_network, read


@pytest.fixture(scope="module")
def lora(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(sd, tmp_path_factory.mktemp("lora") / "lcm.safetensors")


@pytest.fixture
def small(settings: Callable[..., dict[str, Any]], sd: Path) -> Callable[..., Cost]:
    def plan(**changes: Any) -> Cost:
        config, model = parse_config(settings(**changes)), open_model(str(sd))
        return estimate(model, config, batch_plan(config.deepspeed, 1), read(config.seppo, model))

    return plan


def test_an_adapter_is_in_the_plan(small: Callable[..., Cost], lora: Path) -> None:
    plain = small(**{"seppo.sampler.guidance_scale": 1.0, "seppo.sampler.solver": "euler"})
    with_it = small(**{"seppo.sampler.guidance_scale": 1.0, "seppo.sampler.solver": "euler", "seppo.sampler.adapter": str(lora)})
    weights = load_file(lora)
    assert with_it.adapter == sum(value.nbytes for value in weights.values())
    assert with_it.standing - plain.standing == with_it.adapter
    assert with_it.forward == plain.forward and with_it.training == plain.training
    assert plain.sample == 3 * plain.forward, "no guidance, one call a step"
    assert plain.sample < with_it.sample < 1.5 * plain.sample, "LoRA's own products are counted"


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"seppo.sampler.guidance_interval": [0.2, 0.8]}, {"seppo.sampler.unconditional_every": 2},
    {"seppo.sampler.adapter": "LORA", "seppo.sampler.solver": "lcm", "seppo.sampler.guidance_scale": 1.0},
    {"seppo.sampler.adapter": "LORA", "seppo.sampler.solver": "tcd"}], ids=str)
def test_drawing_is_what_the_cpu_allocates(changes: dict[str, Any], settings: Callable[..., dict[str, Any]],
                                           small: Callable[..., Cost], lora: Path, sd: Path) -> None:
    changes = {key: str(lora) if value == "LORA" else value for key, value in changes.items()} | {
        "seppo.sampler.batch_size": 16, "seppo.sampler.steps": 4}
    config, model = parse_config(settings(**changes)), open_model(str(sd))
    ours, network = config.seppo.sampler, model.load_denoiser(torch.float32).eval()
    conditions = blank_conditions(model, torch.zeros(16, 4, 8, 8))
    empty = {name: value[:1] for name, value in conditions.items()}
    denoise, guidance = guided(model, ours.guidance_scale, empty)
    adapter = read(config.seppo, model)
    adapted = [] if adapter is None else beside(network, adapted_network(adapter, model), "cpu", torch.float32)
    drawer = Sampler(network, denoise, rollout_table(model, ours, (4, 8, 8)), empty, guidance, ours, torch.float32, adapted=adapted)
    noise, later = torch.zeros(16, 4, 8, 8), torch.zeros(16, 4, 8, 8)
    real = allocated(lambda: drawer.draw(noise, conditions, later=lambda i: later))
    assert small(**changes).sampler == pytest.approx(real, rel=CLOSE)


def test_samples_that_are_shown_otherwise_are_in_the_plan(small: Callable[..., Cost], lora: Path) -> None:
    adapter = {"seppo.sampler": {"adapter": str(lora), "solver": "lcm", "steps": 2, "batch_size": 64}}
    shown = {"every": 2, "solver": "ddim", "steps": 50, "guidance_scale": 2.0}
    without, grids = small(**adapter), small(**adapter, **{"seppo.samples": shown})
    assert grids.sampler == without.sampler and grids.sample == without.sample, "rollouts are as they were"
    assert grids.grid > 51 * 32 * 4 * 256, "32 at once, of two branches, and 51 latents of each"
    plain = small(**{"seppo.sampler.batch_size": 64, "seppo.samples": {"every": 2, "steps": 3}})
    same = small(**{"seppo.sampler.batch_size": 64, "seppo.samples": {"every": 2}})
    assert plain.memory == same.memory, "settings that change nothing cost nothing"
