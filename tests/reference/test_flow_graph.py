"""That a captured sampler of a flow draws what a plain one does, also with other weights and prompts; needs a GPU."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from seppo_fast.config import Sampler as Settings
from seppo_fast.models import open_model
from seppo_fast.reference import Sampler
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import table_of
from tests.tiny import tiny_flux, tiny_sd3
from tests.tiny_qwen import tiny_qwen
from tests.tiny_wan import tiny_wan

MAKE: dict[str, Callable[[Path], Path]] = {"sd3": tiny_sd3, "flux": tiny_flux, "wan": tiny_wan,
                                           "wan2.2": partial(tiny_wan, expand_timesteps=True),
                                           "qwen": partial(tiny_qwen, scheduler=dict(shift_terminal=None))}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", ["euler", "unipc", "dpmsolver++"])
@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_a_captured_flow_draws_what_a_plain_one_does(name: str, solver: str, tmp_path: Path) -> None:
    model = open_model(str(MAKE[name](tmp_path / name)))
    denoiser = model.load_denoiser(torch.float32).eval().requires_grad_(False).to("cuda")
    shape, said = model.latent_shape(8 * model.vae_scale_factor, 5), []
    empty = {key: torch.randn(1, *size, device="cuda") for key, size in model.condition_shapes.items()}
    denoise, guidance = guided(model, 3.5, empty)
    table = table_of(model, solver, 5, shape).to("cuda")
    plain, captured = (Sampler(denoiser, denoise, table, empty, guidance,
                               Settings(solver=solver, steps=5, guidance_scale=3.5, batch_size=2, cuda_graph=graph), torch.float32,
                               say=said.append) for graph in (False, True))
    for _ in range(2):
        noise = torch.randn(3, *shape, device="cuda")
        given = {key: torch.randn(3, *size, device="cuda") for key, size in model.condition_shapes.items()}
        torch.testing.assert_close(captured.draw(noise, given), plain.draw(noise, given), rtol=1e-4, atol=1e-4)
        for weight in denoiser.parameters():  # in place, as the pool changes them
            weight.mul_(1.01)
    assert any("capture" in line for line in said), "it fell back to plain steps"
