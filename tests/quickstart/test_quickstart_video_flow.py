"""The video quickstart with a flow: its base, hardly trained, through plain diffusers and the trainer; its configuration."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from seppo_fast.configfile import batch_plan, load_config
from seppo_fast.models import open_model
from seppo_fast.quickstart.digits import split_digits
from seppo_fast.quickstart.report import read_metrics
from seppo_fast.quickstart.steps import overrides
from seppo_fast.quickstart.video.__main__ import OUT, main
from seppo_fast.quickstart.video.base import clean_clips, sloppy_crawl
from seppo_fast.quickstart.video.clips import CAPTIONS, random_clips
from seppo_fast.quickstart.video.demonstrations import write_demonstrations
from seppo_fast.quickstart.video.flow import RECIPE, TOKENS, encode_all, make_base, train_transformer
from seppo_fast.quickstart.video.judge import Judge, direction, draw
from seppo_fast.quickstart.video.models import KINDS
from seppo_fast.seeds import generator

FEW = replace(RECIPE, clips=16, vae_steps=2, vae_batch_size=4, denoiser_steps=2, denoiser_batch_size=4)
FRAMES = RECIPE.frames


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart_video_flow") / "base"
    assert make_base(folder, FEW) and not make_base(folder, FEW)
    return folder


@pytest.fixture(scope="module")
def pipeline(base: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(base)


def test_is_a_complete_pipeline_that_diffusers_runs(base: Path, pipeline: WanPipeline) -> None:
    assert all(part is not None for name, part in pipeline.components.items() if name != "transformer_2")
    assert 0.5e6 < sum(weight.numel() for weight in pipeline.transformer.parameters()) < 0.7e6
    together = draw(base, None, [7, 39, 7], 0, 2, 2.0, FRAMES)
    assert together.shape == (3, FRAMES, 1, 32, 32) and together.isfinite().all() and 0 <= together.min() and together.max() <= 1
    torch.testing.assert_close(draw(base, None, [7, 39, 7], 0, 2, 2.0, FRAMES, batch_size=1), together, atol=1e-4, rtol=0)


def test_each_channel_of_the_latents_has_mean_0_and_deviation_1(base: Path) -> None:
    model = open_model(str(base), frames=FRAMES)
    latents = encode_all(model.load_vae("cpu"), sloppy_crawl(clean_clips(FEW), FEW))
    scaled = model.latent_scale.scaled(latents)
    assert scaled.shape == (FEW.clips, *model.latent_shape(32, FRAMES)) == (16, 16, 5, 4, 4)
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3, 4)), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3, 4)), torch.ones(16), atol=1e-4, rtol=0)


def test_the_trainer_encodes_captions_as_the_base_has_learnt_them(base: Path, pipeline: WanPipeline) -> None:
    model = open_model(str(base), frames=FRAMES)
    found = model.load_text("cpu")([*CAPTIONS, ""])["prompt_embeds"]
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt([*CAPTIONS, ""], do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    torch.testing.assert_close(found, embeds)
    assert model.name == "wan" and found.shape[1] == TOKENS and len(found.unique(dim=0)) == 41  # all told apart
    for caption in CAPTIONS:
        ids = pipeline.tokenizer(caption).input_ids
        assert len(ids) <= TOKENS and pipeline.tokenizer.unk_token_id not in ids


def test_the_base_learns_the_velocity_from_noise_to_sample(pipeline: WanPipeline) -> None:
    """Of a point at 0 the best answer is the noise, of which the noisy latents are sigma times: exactly known."""
    learner = deepcopy(pipeline.transformer)
    embeds = torch.zeros(41, TOKENS, 64)
    train_transformer(learner, embeds, torch.zeros(8, 16, 2, 4, 4), torch.arange(8),
                      replace(FEW, denoiser_steps=25, denoiser_batch_size=16, denoiser_lr=1e-2))
    noise = torch.randn(8, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = learner(0.8 * noise, timestep=torch.full((8,), 800.0), encoder_hidden_states=embeds[:8], return_dict=False)[0]
    assert torch.nn.functional.cosine_similarity(found.flatten(), noise.flatten(), dim=0) > 0.5


def test_clips_of_17_frames_are_judged_as_those_of_16() -> None:
    digits, held_out = split_digits(0)
    clips = random_clips(digits, 40, generator("test"), FRAMES)
    assert clips.pixels.shape == (40, FRAMES, 1, 32, 32) and (direction(clips.pixels) == clips.labels % 4).all()
    scores = Judge(held_out, digits, samples=40, frames=FRAMES).score(clips.pixels, clips.labels.tolist())
    assert scores.direction_accuracy == scores.moving == 1.0 and scores.ssim > 0.8


def test_four_updates_by_the_shipped_configuration(base: Path, train: Any, tmp_path: Path) -> None:
    write_demonstrations(tmp_path / "demonstrations", random_clips(split_digits(0)[0], 8, generator("few"), FRAMES))
    config = load_config("quickstart_video_flow.json", [
        *overrides(tmp_path, seed=0), f"seppo.model.path={base}", "train_batch_size=4", "train_micro_batch_size_per_gpu=4",
        f"seppo.data.source={tmp_path / 'demonstrations' / 'demonstrations.csv'}", "scheduler.params.total_num_steps=4",
        "scheduler.params.warmup_num_steps=1", "seppo.iterations=1", "seppo.updates_per_iteration=4", "seppo.sampler.steps=2"])
    run = train(config.deepspeed | {"seppo": config.as_dict()["seppo"]})
    before, after = (draw(base, lora, [4], 0, 2, 2.0, FRAMES) for lora in (None, run / "final"))
    assert after.isfinite().all() and (after - before).abs().max() > 1e-5
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["update"] for row in rows] == [1, 2, 3, 4] and rows[-1]["abs_logit_p50"] > 0


def test_the_shipped_configuration_is_the_method_and_fits_the_model(tmp_path: Path) -> None:
    config = load_config(KINDS["flow"].config, overrides(tmp_path, seed=3))
    seppo = config.seppo
    assert (seppo.method, seppo.reference, seppo.flipper, seppo.seed) == ("seppo", "uniform", "aaf", 3)
    assert seppo.data.video.frames == FRAMES and seppo.data.resolution == 32 and not seppo.data.flip and seppo.model.lora
    assert batch_plan(config.deepspeed, 1).size == 32
    assert config.deepspeed["scheduler"]["params"]["total_num_steps"] == seppo.updates


def test_the_models_of_the_command_are_those_that_can_be_made(tmp_path: Path) -> None:
    assert OUT.keys() == KINDS.keys() and len({*OUT.values()}) == len(OUT)
    (tmp_path / "file").write_text("")
    assert main(["--model", "flow", "--out", str(tmp_path / "file" / "out")]) == 2
