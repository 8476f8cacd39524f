"""The sampler on flow transformers of published sizes with random weights: captured beside plain steps, and whether they agree."""

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.result_files import Keep, Row
from benchmarks.timing import alternated
from seppo_fast.config import Sampler as Settings
from seppo_fast.models import Model
from seppo_fast.models.published import published_model
from seppo_fast.reference import Sampler
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import table_of


class Network(NamedTuple):
    """How a model is drawn from; FLUX.1-dev has the guidance scale as an input."""

    guidance: float
    pixels: int = 1024
    frames: int = 1


WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
NETWORKS = {"stabilityai/stable-diffusion-3.5-medium": Network(4.5), "black-forest-labs/FLUX.1-dev": Network(3.5),
            WAN: Network(5.0, 480, 49)}
Point = tuple[str, int, int]  # network, batch, steps; the most important first
POINTS: list[Point] = [("stabilityai/stable-diffusion-3.5-medium", 4, 20), ("black-forest-labs/FLUX.1-dev", 2, 20),
                       (WAN, 1, 20), ("stabilityai/stable-diffusion-3.5-medium", 16, 20), ("black-forest-labs/FLUX.1-dev", 1, 20)]


def measure(device: str, keep: Keep, seconds: float, points: Sequence[Point] = POINTS, models: Mapping[str, Model] | None = None,
            drawn: Network | None = None) -> None:
    """Store a row for each point, with images per second of both ways; no point is begun after `seconds`.

    `models` are other models in place of the published ones, which are all `drawn` from in the same way.
    """
    until, result = time.perf_counter() + seconds, {"rows": [], "not_reached": []}
    for name, batch, steps in points:
        if time.perf_counter() > until:
            result["not_reached"].append(f"{name} batch {batch}, {steps} steps")
        else:
            model = models[name] if models else published_model(name)
            network = drawn or NETWORKS[name]
            result["rows"].append({"network": name, "batch": batch, "steps": steps, **network._asdict()}
                                  | row_of(model, batch, steps, network, device))
        keep(result)


@torch.no_grad()
def row_of(model: Model, batch: int, steps: int, network: Network, device: str) -> Row:
    """Images per second captured and with plain steps, and how far their samples lie apart, in standard deviations."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # FLUX.1 in fp32 would need twice its memory while it is made
    try:
        with torch.device(device):
            denoiser = model.empty_denoiser().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    shape = model.latent_shape(network.pixels, network.frames)
    given = {name: torch.randn(batch, *size, device=device, dtype=dtype) for name, size in model.condition_shapes.items()}
    noise, said = torch.randn(batch, *shape, device=device), []
    empty = {name: value[:1] for name, value in given.items()}
    denoise, guidance = guided(model, network.guidance, empty)
    table = table_of(model, "euler", steps, shape).to(device)
    settings = Settings(solver="euler", steps=steps, guidance_scale=network.guidance, batch_size=batch)
    samplers = {name: Sampler(denoiser, denoise, table, empty, guidance, settings.model_copy(update={"cuda_graph": graph}), dtype,
                              say=said.append) for name, graph in (("captured", True), ("plain", False))}
    drawn = {name: sampler.draw(noise, given).float() for name, sampler in samplers.items()}
    apart = (drawn["captured"] - drawn["plain"]).abs().max() / drawn["plain"].std()
    times = alternated({name: partial(sampler.draw, noise, given) for name, sampler in samplers.items()}, 2.0, device)
    return {"difference": float(f"{apart.item():.2g}"), "said": said,
            **{f"{name}_images_per_s": round(batch / statistics.median(took), 4) for name, took in times.items()}}
