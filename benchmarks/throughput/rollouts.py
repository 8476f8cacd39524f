"""Rollouts with fewer calls of the network: images per second of each way, captured beside plain steps, and whether they agree."""

import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.networks import lcm_lora
from benchmarks.result_files import Keep, Row
from benchmarks.timing import alternated
from seppo_fast.config import Sampler as Settings
from seppo_fast.models import Model
from seppo_fast.models.published import published_model
from seppo_fast.reference import Sampler
from seppo_fast.reference.adapter import beside
from seppo_fast.reference.calls import evaluations
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import rollout_table
from seppo_fast.training.adapter import adapted_network

MODEL, PIXELS, BATCH = "stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 16
FEW, INTERVAL, EVERY = {"solver": "dpmsolver++", "steps": 20}, {"guidance_interval": [0.07, 0.81]}, {"unconditional_every": 2}
# Keys of seppo.sampler; the most important first.
WAYS: dict[str, dict[str, Any]] = {
    "these three": FEW | INTERVAL | EVERY, "paper": {}, "adapter": {"adapter": "lcm", "solver": "lcm", "steps": 4},
    "fewer steps": FEW, "interval": INTERVAL, "every second": EVERY,
}


def measure(device: str, keep: Keep, seconds: float, model: Model | None = None, pixels: int = PIXELS, batch: int = BATCH,
            ways: Mapping[str, Mapping[str, Any]] = WAYS) -> None:
    """Store a row for each way, with images per second of both; none is begun after `seconds`. Weights are random."""
    until, result = time.perf_counter() + seconds, {"network": MODEL, "batch": batch, "rows": [], "not_reached": []}
    model = model or published_model(MODEL)
    if model is None:
        raise SystemExit(f"{MODEL} has no published shape here")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        denoiser = model.empty_denoiser().eval().requires_grad_(False).to(dtype)
    for name, keys in ways.items():
        if time.perf_counter() > until:
            result["not_reached"].append(name)
        else:
            settings = Settings(**{"batch_size": batch, **keys})
            result["rows"].append({"way": name, **row_of(model, denoiser, settings, pixels, batch, device)})
        keep(result)


@torch.no_grad()
def row_of(model: Model, denoiser: torch.nn.Module, settings: Settings, pixels: int, batch: int, device: str) -> Row:
    """Images per second captured and with plain steps, and how far their samples lie apart, in standard deviations."""
    dtype, shape = next(denoiser.parameters()).dtype, model.latent_shape(pixels, 1)
    given = {name: torch.randn(batch, *size, device=device, dtype=dtype) for name, size in model.condition_shapes.items()}
    empty = {name: value[:1] for name, value in given.items()}
    denoise, guidance = guided(model, settings.guidance_scale, empty)
    table = rollout_table(model, settings, shape).to(device)
    adapted = []
    if settings.adapter is not None:
        adapted = beside(denoiser, adapted_network(lcm_lora(model, 0.01), model), device, dtype)
    noise, later = (torch.randn(batch, *shape, device=device) for _ in range(2))
    said: list[str] = []
    samplers = {name: Sampler(denoiser, denoise, table, empty, guidance, settings.model_copy(update={"cuda_graph": graph}), dtype,
                              say=said.append, adapted=adapted) for name, graph in (("captured", True), ("plain", False))}
    draws = {name: partial(sampler.draw, noise, given, later=lambda index: later.roll(index, -1))
             for name, sampler in samplers.items()}
    drawn = {name: draw().float() for name, draw in draws.items()}
    apart = (drawn["captured"] - drawn["plain"]).abs().max() / drawn["plain"].std()
    times = alternated(draws, 2.0 if device == "cuda" else 0.0, device)
    return {"calls": evaluations(samplers["plain"].calls, guidance), "difference": float(f"{apart.item():.2g}"), "said": said,
            **{f"{name}_images_per_s": round(batch / statistics.median(took), 4) for name, took in times.items()}}
