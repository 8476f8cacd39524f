"""The quickstart's base model and judge, with very few training steps, through plain diffusers."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from seppo_fast.models import open_model
from seppo_fast.quickstart.base import Recipe, make_base
from seppo_fast.quickstart.digits import CAPTIONS
from seppo_fast.quickstart.judge import draw

RECIPE = Recipe(vae_steps=3, text_steps=3, denoiser_steps=3, batch_size=8, copies=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "base"
    assert make_base(folder, RECIPE)
    return folder


def test_is_a_complete_pipeline_that_diffusers_runs(base):
    index = json.loads((base / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    assert pipeline.vae_scale_factor == 2
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels == 4
    assert 0.9e6 < sum(weight.numel() for weight in pipeline.unet.parameters()) < 1.1e6
    pictures = draw(base, [7, 3, 7], seed=0, steps=2, guidance_scale=2.0, batch_size=2)
    assert pictures.shape == (3, 3, 16, 16) and pictures.isfinite().all()
    assert pictures.min() >= 0 and pictures.max() <= 1


def test_scaling_factor_is_the_latents_own(base):
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    from seppo_fast.quickstart.base import encode_all
    from seppo_fast.quickstart.digits import sloppy_crawl, split_digits

    crawl = sloppy_crawl(split_digits(RECIPE.seed)[0], RECIPE.seed, 1, RECIPE.wrong_captions, RECIPE.degraded)
    scaled = encode_all(pipeline.vae, crawl) * pipeline.vae.config.scaling_factor
    assert scaled.std().item() == pytest.approx(1, abs=0.01)


def test_noise_does_not_depend_on_the_batch_size(base):
    alone = draw(base, [1, 2, 3], seed=5, steps=2, guidance_scale=2.0, batch_size=1)
    together = draw(base, [1, 2, 3], seed=5, steps=2, guidance_scale=2.0, batch_size=3)
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)
    assert not torch.allclose(draw(base, [1, 2, 3], seed=6, steps=2, guidance_scale=2.0), together, atol=1e-4)


def test_the_trainer_opens_it(base):
    model = open_model(str(base))
    assert model.name == "sd" and model.vae_scale_factor == 2
    conditions = model.load_text(torch.device("cpu"))([*CAPTIONS, ""])
    assert conditions["prompt_embeds"].shape == (11, 77, 32)


@pytest.mark.slow
def test_is_reused_only_when_made_alike(base):
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*") if path.is_file()}
    assert not make_base(base, RECIPE)
    assert before == {path: path.stat().st_mtime_ns for path in base.rglob("*") if path.is_file()}
    other = base.with_name("other")
    base_bytes = (base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert make_base(other, RECIPE)
    assert (other / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == base_bytes
    changed = Recipe(**{**json.loads((base / "made_of.json").read_text())["recipe"], "seed": 1})
    assert make_base(other, changed)
    assert (other / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != base_bytes
