"""The sampler on flow transformers of published sizes with random weights: captured beside plain steps, and whether they agree."""

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from benchmarks.result_files import Keep, Row
from benchmarks.timing import alternated
from seppo_fast.config import Sampler as Settings
from seppo_fast.models import Model
from seppo_fast.models.published import published_model
from seppo_fast.reference import Sampler
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import table_of

# Hub id -> guidance scale. FLUX.1-dev has it as an input.
NETWORKS = {"stabilityai/stable-diffusion-3.5-medium": 4.5, "black-forest-labs/FLUX.1-dev": 3.5}
SIDE = 128  # latents, of 1024 pixels
Point = tuple[str, int, int]  # network, batch, steps; the most important first
POINTS: list[Point] = [("stabilityai/stable-diffusion-3.5-medium", 4, 20), ("black-forest-labs/FLUX.1-dev", 2, 20),
                       ("stabilityai/stable-diffusion-3.5-medium", 16, 20), ("black-forest-labs/FLUX.1-dev", 1, 20)]


def measure(device: str, keep: Keep, seconds: float, points: Sequence[Point] = POINTS, models: Mapping[str, Model] | None = None,
            side: int = SIDE) -> None:
    """Store a row for each point, with images per second of both ways; no point is begun after `seconds`."""
    until, result = time.perf_counter() + seconds, {"side": side, "rows": [], "not_reached": []}
    for name, batch, steps in points:
        if time.perf_counter() > until:
            result["not_reached"].append(f"{name} batch {batch}, {steps} steps")
        else:
            model = models[name] if models else published_model(name)
            result["rows"].append({"network": name, "batch": batch, "steps": steps}
                                  | row_of(model, batch, steps, NETWORKS.get(name, 3.5), side, device))
        keep(result)


@torch.no_grad()
def row_of(model: Model, batch: int, steps: int, scale: float, side: int, device: str) -> Row:
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
    shape = model.latent_shape(side * model.vae_scale_factor, 1)
    given = {name: torch.randn(batch, *size, device=device, dtype=dtype) for name, size in model.condition_shapes.items()}
    noise, said = torch.randn(batch, *shape, device=device), []
    empty = {name: value[:1] for name, value in given.items()}
    denoise, guidance = guided(model, scale, empty)
    table = table_of(model, "euler", steps, shape).to(device)
    settings = Settings(solver="euler", steps=steps, guidance_scale=scale, batch_size=batch)
    samplers = {name: Sampler(denoiser, denoise, table, empty, guidance, settings.model_copy(update={"cuda_graph": graph}), dtype,
                              say=said.append) for name, graph in (("captured", True), ("plain", False))}
    drawn = {name: sampler.draw(noise, given).float() for name, sampler in samplers.items()}
    apart = (drawn["captured"] - drawn["plain"]).abs().max() / drawn["plain"].std()
    times = alternated({name: partial(sampler.draw, noise, given) for name, sampler in samplers.items()}, 2.0, device)
    return {"difference": float(f"{apart.item():.2g}"), "said": said,
            **{f"{name}_images_per_s": round(batch / statistics.median(took), 4) for name, took in times.items()}}
