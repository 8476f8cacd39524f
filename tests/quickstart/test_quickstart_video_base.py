"""The video quickstart's base model, with very few training steps, through plain diffusers."""

import json

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from peft import LoraConfig

from seppo_fast.quickstart.video.base import LATENTS, Recipe, encode_all, make_base
from seppo_fast.quickstart.video.clips import random_clips, spoiled
from seppo_fast.quickstart.video.judge import draw
from seppo_fast.seeds import generator

RECIPE = Recipe(clips=16, vae_steps=2, vae_batch_size=4, text_steps=2, text_batch_size=4, denoiser_steps=2, denoiser_batch_size=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart_video") / "base"
    assert make_base(folder, RECIPE)
    return folder


@pytest.fixture(scope="module")
def pipeline(base):
    return AnimateDiffPipeline.from_pretrained(base)


def test_is_a_complete_pipeline_that_diffusers_runs(base, pipeline):
    index = json.loads((base / "model_index.json").read_text())
    assert index["_class_name"] == "AnimateDiffPipeline" and index["unet"][1] == "UNetMotionModel"
    assert pipeline.vae_scale_factor == 8
    assert pipeline.scheduler.config.beta_schedule == "linear"
    clips = draw(base, None, [7, 39, 7], seed=0, steps=2, guidance_scale=2.0, batch_size=2)
    assert clips.shape == (3, 16, 1, 32, 32) and clips.isfinite().all()
    assert clips.min() >= 0 and clips.max() <= 1


def test_motion_adapter_is_the_unet_s_own(base, pipeline):
    adapter = MotionAdapter.from_pretrained(base / "motion_adapter").state_dict()
    of_unet = {name: weight for name, weight in pipeline.unet.state_dict().items() if "motion_modules." in name}
    assert adapter.keys() == of_unet.keys() and len(adapter) > 100
    assert all(torch.equal(adapter[name], weight) for name, weight in of_unet.items())


def test_scaling_factor_is_the_latents_own(pipeline):
    from seppo_fast.quickstart.digits import split_digits

    clips = random_clips(split_digits(0)[0], RECIPE.clips, generator(0, "clips"))
    latents = encode_all(pipeline.vae, spoiled(clips, RECIPE.wrong_directions, RECIPE.bad_motion, RECIPE.degraded, 0))
    assert latents.shape == (16, *LATENTS[:1], 16, *LATENTS[1:])
    assert (latents * pipeline.vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_noise_does_not_depend_on_the_batch_size(base):
    alone = draw(base, None, [1, 2], seed=5, steps=2, guidance_scale=2.0, batch_size=1)
    together = draw(base, None, [1, 2], seed=5, steps=2, guidance_scale=2.0, batch_size=2)
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)
    assert not torch.allclose(draw(base, None, [1, 2], seed=6, steps=2, guidance_scale=2.0), together, atol=1e-4)


@pytest.mark.slow
def test_draws_with_lora_weights(base, tmp_path):
    unet = AnimateDiffPipeline.from_pretrained(base).unet
    names = [name for name, _ in unet.named_modules() if "motion_modules" in name and name.endswith("to_q")]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False))
    weights = {name.replace(".default.", "."): weight for name, weight in unet.named_parameters() if "lora_" in name}
    AnimateDiffPipeline.save_lora_weights(tmp_path, unet_lora_layers=weights)
    plain = draw(base, None, [1], seed=0, steps=2, guidance_scale=2.0)
    assert (draw(base, tmp_path, [1], seed=0, steps=2, guidance_scale=2.0) - plain).abs().max() > 1e-4


@pytest.mark.slow
def test_is_made_alike_twice_and_reused(base):
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*") if path.is_file()}
    assert not make_base(base, RECIPE)
    assert before == {path: path.stat().st_mtime_ns for path in base.rglob("*") if path.is_file()}
    other = base.with_name("other")
    assert make_base(other, RECIPE)
    assert {path.relative_to(base): path.read_bytes() for path in before} == {
        path.relative_to(other): path.read_bytes() for path in other.rglob("*") if path.is_file()}
