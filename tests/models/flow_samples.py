"""What this package's sampler draws with a flow model, to be compared with the model's diffusers pipeline."""

from functools import cache

import torch
from torch import Tensor, nn

from seppo_fast.config import Sampler
from seppo_fast.models import Conditions, Model
from seppo_fast.reference import sampler
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import table_of


@cache
def embedded(model: Model, *prompts: str) -> Conditions:
    """The conditions of the prompts."""
    return model.load_text("cpu")([*prompts])


def ours(model: Model, prompts: list[str], noise: Tensor, solver: str, steps: int, scale: float, denoiser: nn.Module | None = None
         ) -> Tensor:
    """The sampler's latents."""
    conditions, empty = embedded(model, *prompts), embedded(model, "")
    denoise, guidance = guided(model, scale, empty)
    settings = Sampler(solver=solver, steps=steps, guidance_scale=scale, batch_size=len(prompts))
    module = (denoiser or model.load_denoiser(torch.float32)).eval()
    return sampler.Sampler(module, denoise, table_of(model, solver, steps, noise.shape[1:]), empty, guidance, settings,
                           torch.float32).draw(noise, conditions)
