"""Flow models in an evaluation: what diffusers' pipelines draw from the same noise and prompt, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from PIL import Image
from tiny import tiny_flux, tiny_sd3

from seppo_fast.errors import UserError
from seppo_fast.evaluate import parse_arguments
from seppo_fast.evaluation.arguments import request_of
from seppo_fast.evaluation.generate import initial_noise, latent_shape, open_renderer

PROMPT = "a red cat"
PIPELINES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline, "schnell": FluxPipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny directory of each family, and prompts."""
    root = tmp_path_factory.mktemp("flows")
    (root / "prompts.txt").write_text(f"{PROMPT}\n")
    return {"sd3": tiny_sd3(root / "sd3"), "flux": tiny_flux(root / "flux"), "prompts": root / "prompts.txt",
            "schnell": tiny_flux(root / "schnell", dynamic=False, guidance_embeds=False)}


@pytest.fixture
def arguments(folders: dict[str, Path]) -> Callable[..., list[str]]:
    """`arguments(out, name, *more)`: the command's, for a model."""
    return lambda out, name, *more: ["--models", f"base={folders[name]}", "--prompts", str(folders["prompts"]), "--out", str(out),
                                     "--scores", "pickscore", *more]


def drawn_by_diffusers(name: str, folder: Path, noise: torch.Tensor, form: str, **given: Any) -> Any:
    pipeline = PIPELINES[name].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if name != "sd3":
        noise = pipeline._pack_latents(noise, *noise.shape)
    made = pipeline(PROMPT, height=16, width=16, latents=noise, output_type=form, **given).images
    if name != "sd3" and form == "latent":
        return pipeline._unpack_latents(made, 16, 16, pipeline.vae_scale_factor)
    return made


@pytest.mark.parametrize(("name", "scale"), [("sd3", 7.5), ("sd3", 1.0), ("flux", 7.5), ("schnell", 1.0)])
def test_samples_are_the_pipelines(name: str, scale: float, folders: Any, arguments: Any, ranks: Any, evaluated: Any,
                                   tmp_path: Path) -> None:
    """Its latents before, and its picture after rounding; the command chooses the solver, and the scale where it is 7.5."""
    more = () if scale == 7.5 else ("--guidance-scale", str(scale))
    more = (*more, "--steps", "4", "--resolution", "16")
    request = request_of(parse_arguments(arguments(tmp_path / "out", name, *more)), ranks, print)
    drawing, (candidate,) = request.drawing, request.candidates
    assert drawing.sampler.solver == "euler"
    noise = initial_noise(latent_shape(candidate.model, drawing), 0, PROMPT, 0)[None]
    theirs = drawn_by_diffusers(name, folders[name], noise, "latent", num_inference_steps=4, guidance_scale=scale)
    renderer = open_renderer(candidate, drawing, ranks, 1, lambda line: None)
    ours = renderer.draw(noise, renderer.embed([PROMPT]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    evaluated(arguments(tmp_path / "out", name, *more))
    (file,) = (tmp_path / "out" / "samples" / "base").glob("*.png")
    picture = 255 * drawn_by_diffusers(name, folders[name], noise, "np", num_inference_steps=4, guidance_scale=scale)[0]
    assert np.abs(picture - np.array(Image.open(file)).astype(float)).max() < 0.6  # of a grey level: rounded once
