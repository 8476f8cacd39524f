"""Flow models in an evaluation: what diffusers' pipelines draw from the same noise and prompt, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline
from PIL import Image
from tiny import tiny_flux, tiny_sd3
from tiny_qwen import TOKENS, tiny_qwen

from seppo_fast.errors import UserError
from seppo_fast.evaluate import parse_arguments
from seppo_fast.evaluation.arguments import dtype_of, request_of
from seppo_fast.evaluation.candidates import open_candidates
from seppo_fast.evaluation.generate import initial_noise, latent_shape, open_renderer
from seppo_fast.evaluation.prompts import Prompt, tell_truncated
from seppo_fast.models import open_model

PROMPT = "a red cat"
PIPELINES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline, "schnell": FluxPipeline, "qwen": QwenImagePipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny directory of each family, and prompts."""
    root = tmp_path_factory.mktemp("flows")
    (root / "prompts.txt").write_text(f"{PROMPT}\n")
    return {"sd3": tiny_sd3(root / "sd3"), "flux": tiny_flux(root / "flux"), "prompts": root / "prompts.txt",
            "qwen": tiny_qwen(root / "qwen"), "schnell": tiny_flux(root / "schnell", dynamic=False, guidance_embeds=False)}


@pytest.fixture
def arguments(folders: dict[str, Path]) -> Callable[..., list[str]]:
    """`arguments(out, name, *more)`: the command's, for a model."""
    return lambda out, name, *more: ["--models", f"base={folders[name]}", "--prompts", str(folders["prompts"]), "--out", str(out),
                                     "--scores", "pickscore", *more]


def drawn_by_diffusers(name: str, folder: Path, noise: torch.Tensor, form: str, **given: Any) -> Any:
    pipeline = PIPELINES[name].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if name == "qwen":
        given |= {"true_cfg_scale": given.pop("guidance_scale"), "negative_prompt": "", "max_sequence_length": TOKENS}
    if name != "sd3":
        noise = pipeline._pack_latents(noise, *noise.shape)
    made = pipeline(PROMPT, height=16, width=16, latents=noise, output_type=form, **given).images
    if name != "sd3" and form == "latent":
        return pipeline._unpack_latents(made, 16, 16, pipeline.vae_scale_factor).reshape(noise.shape[0], 4, 8, 8)
    return made


@pytest.mark.parametrize(("name", "scale"), [("sd3", 7.5), ("sd3", 1.0), ("flux", 7.5), ("schnell", 1.0), ("qwen", 7.5),
                                             ("qwen", 1.0)])
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


@pytest.mark.parametrize(("name", "more", "message"), [
    ("schnell", (), "^--guidance-scale: 7.5 has no effect on .*schnell.*set it to 1"),
    ("sd3", ("--solver", "ddim"), "^--solver: 'ddim' is for DDPM-like models"),
    ("flux", ("--steps", "1001"), "^--steps: 1001 is not between 1 and the model's 1000"),
    ("flux", ("--resolution", "18"), "^--resolution 18 is no multiple of 4, as .* needs it"),
    ("sd3", ("--resolution", "64"), "images of 64 pixels are larger than its transformer can place: at most 32"),
])
def test_what_a_flow_cannot_draw_is_refused_before_anything_is_drawn(name: str, more: tuple[str, ...], message: str, folders: Any,
                                                                     arguments: Any, ranks: Any, tmp_path: Path) -> None:
    """Also of the second model, which is drawn after the first."""
    for models in ([f"x={folders[name]}"], [f"first={folders['sd3']}", f"x={folders[name]}"]):
        given = ["--models", *models, *arguments(tmp_path / "out", name, *more)[2:]]
        with pytest.raises(UserError, match=message):
            request_of(parse_arguments(given), ranks, print)


@pytest.mark.parametrize(("name", "side"), [("sd3", 8), ("flux", 128)])
def test_the_size_is_the_models_own(name: str, side: int, folders: Any, arguments: Any, ranks: Any, tmp_path: Path) -> None:
    request = request_of(parse_arguments(arguments(tmp_path / "out", name)), ranks, print)
    assert latent_shape(request.candidates[0].model, request.drawing) == (4, side, side)


def test_the_precision_of_flows_on_a_gpu_is_bfloat16(folders: Any) -> None:
    sd3 = open_candidates([f"x={folders['sd3']}"], None, None, 16)
    for device, name, wanted in (("cuda", "auto", torch.bfloat16), ("cpu", "auto", torch.float32),
                                 ("cuda", "bfloat16", torch.bfloat16)):
        assert dtype_of(name, torch.device(device), sd3) == wanted
    assert dtype_of("auto", torch.device("cuda"), []) == torch.float16


@pytest.mark.parametrize(("name", "limit"), [("sd3", 256), ("flux", 512), ("schnell", 512)])
def test_prompts_that_t5_sees_are_not_called_cut_off(name: str, limit: int, folders: Any) -> None:
    """Though CLIP sees 77 tokens of them; the end token is one of T5's."""
    model, said = open_model(str(folders[name])), []
    seen, longer = Prompt("cat " * (limit - 1), ("all",)), Prompt("cat " * limit, ("all",))
    tell_truncated([seen], model, said.append)
    assert not said
    tell_truncated([seen, longer], model, said.append)
    assert len(said) == 1 and f"of 2 1 is longer than the {limit} tokens" in said[0] and f"has {limit + 1}" in said[0]


def test_without_t5_clip_sees_77_tokens(tmp_path: Path) -> None:
    folder, said = tiny_sd3(tmp_path / "sd3"), []
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}))
    tell_truncated([Prompt("cat " * 90, ("all",))], open_model(str(folder)), said.append)
    assert len(said) == 1 and "longer than the 77 tokens" in said[0]
