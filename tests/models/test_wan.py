"""Wan against its diffusers pipeline: prompts, latents, samples, exports; and the directories that are refused."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from models.flow_samples import ours
from tiny_wan import WAN_FRAMES, WAN_LATENTS, tiny_wan

from seppo_fast.config import Lora
from seppo_fast.errors import UserError
from seppo_fast.evaluation.candidates import Candidate
from seppo_fast.models import open_model
from seppo_fast.models.export import save_pipeline
from seppo_fast.models.lora import add_lora, trainable_weights

PROMPTS = ["a red cat", "the sky and a dog", "", "  A &amp; B "]
# Wan 2.1, and TI2V-5B of 2.2: a residual VAE on patches of pixels, and a time for each token.
KINDS = {"2.1": {}, "2.2": dict(expand_timesteps=True, vae=dict(channels=6, patch_size=2, in_channels=12, out_channels=12,
                                                               is_residual=True, decoder_base_dim=12, scale_factor_spatial=8))}


def pipeline_of(folder):
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return tiny_wan(tmp_path_factory.mktemp("models") / "wan", **KINDS[request.param])


@pytest.fixture(scope="module")
def model(folder):
    return open_model(str(folder), frames=WAN_FRAMES)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_wan(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def pipeline(folder):
    return pipeline_of(folder)


def test_facts_of_the_directory(model, folder, pipeline):
    config = pipeline.vae.config
    assert (model.path, model.latent_channels, model.vae_scale_factor) == (folder, config.z_dim, config.scale_factor_spatial)
    assert (model.multiple, model.video, model.prediction_type, model.num_train_timesteps) == (16, True, "flow", 1000)
    assert model.latent_shape(32, 9) == (config.z_dim, 3, *[32 // config.scale_factor_spatial] * 2)
    assert model.time_shift(model.latent_shape(32, 9)) == 3.0


def test_prompts_as_the_pipeline_encodes_them(model, pipeline):
    got = model.load_text("cpu")(PROMPTS)["prompt_embeds"]
    with torch.no_grad():
        wanted, negative = pipeline.encode_prompt(PROMPTS, device="cpu", max_sequence_length=32)
    assert torch.equal(got, wanted) and got.shape == (len(PROMPTS), *model.condition_shapes["prompt_embeds"])
    assert torch.equal(got[2:3], negative[:1]) and len(wanted.unique(dim=0)) == len(PROMPTS)
    assert not got[:, -1].any() and got[:, 0].any(), "padding is zero"


@torch.no_grad()
def test_vae_both_ways(model, pipeline):
    vae, config = model.load_vae("cpu"), pipeline.vae.config
    assert vae.dtype == torch.float32 and not vae.training
    clips = torch.rand(2, 9, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = model.encode(vae, clips)
    posterior = pipeline.vae.encode(clips.transpose(1, 2)).latent_dist
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, posterior.std, atol=1e-5, rtol=1e-5)
    latents = model.latent_scale.scaled(mean)
    means, stds = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(latents, (mean - means) / stds)  # as WanImageToVideoPipeline does
    assert latents.shape[1:] == (model.latent_channels, 3, 32 // model.vae_scale_factor, 48 // model.vae_scale_factor)
    video = pipeline.vae.decode(latents * stds + means).sample
    got = model.decode(vae, latents)
    torch.testing.assert_close(got, (video.transpose(1, 2) / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)
    assert got.shape == (2, 9, 3, 32, 48)


def theirs(pipeline, model, prompts, noise, solver, steps, scale):
    """The pipeline's latents, with the solver that a user of diffusers would put into it."""
    before, (frames, *sides) = pipeline.scheduler, noise.shape[-3:]
    if solver == "euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=before.config.flow_shift)
    height, width = (side * model.vae_scale_factor for side in sides)
    try:
        return pipeline(prompts, latents=noise, num_inference_steps=steps, guidance_scale=scale, height=height, width=width,
                        num_frames=4 * (frames - 1) + 1, output_type="latent", max_sequence_length=32).frames
    finally:
        pipeline.scheduler = before


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize(("solver", "steps"), [("euler", 4), ("unipc", 8)])
def test_samples_are_the_pipeline_s(solver, steps, scale, model, pipeline):
    noise = torch.randn(2, model.latent_channels, 3, 4, 8, generator=torch.Generator().manual_seed(3))
    prompts = ["a red cat", "the sky and a dog"]
    got, wanted = ours(model, prompts, noise, solver, steps, scale), theirs(pipeline, model, prompts, noise, solver, steps, scale)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - noise).abs().max() > 0.1


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=6.0)])
def test_what_is_exported_is_loaded_by_diffusers(lora, model, folder, pipeline, tmp_path):
    denoiser = model.load_denoiser(torch.float32)
    if lora is not None:
        add_lora(denoiser, lora, seed=0)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_weights(denoiser).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    save_pipeline(model, dict(trainable_weights(denoiser)), tmp_path / "final", lora, "")
    found = pipeline_of(folder if lora else tmp_path / "final")
    noise = torch.randn(1, model.latent_channels, 2, 4, 4, generator=random)
    before = theirs(pipeline, model, ["a cat"], noise, "unipc", 3, 2.0)
    if lora is not None:
        found.load_lora_weights(tmp_path / "final")
    wanted = ours(model, ["a cat"], noise, "unipc", 3, 2.0, denoiser)
    got = theirs(found, model, ["a cat"], noise, "unipc", 3, 2.0)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - before).abs().max() > 1e-3


def test_what_the_pipeline_keeps_in_fp32_is_so(plain):
    of_pipeline = WanPipeline.from_pretrained(plain, torch_dtype=torch.bfloat16).transformer
    dtypes = {name: weight.dtype for name, weight in of_pipeline.state_dict().items()}
    ours = open_model(str(plain), frames=5).load_denoiser(torch.bfloat16)
    assert {name: weight.dtype for name, weight in ours.state_dict().items()} == dtypes
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32 != dtypes["proj_out.weight"]
    assert {name: table.dtype for name, table in ours.named_buffers()} == {
        name: table.dtype for name, table in of_pipeline.named_buffers()}


def test_a_lora_in_half_precision_leaves_what_is_kept_in_fp32(plain, tmp_path):
    model, lora = open_model(str(plain), frames=5), Lora(rank=2)
    denoiser = model.load_denoiser(torch.float32)
    add_lora(denoiser, lora, seed=0)
    save_pipeline(model, dict(trainable_weights(denoiser)), tmp_path / "final", lora, "")
    file = tmp_path / "final" / "pytorch_lora_weights.safetensors"
    tuned = Candidate("tuned", str(file), model, file, None).load_denoiser(torch.bfloat16)
    found = {name.replace(".base_layer", ""): weight.dtype for name, weight in tuned.named_parameters()}
    base = {name: weight.dtype for name, weight in model.load_denoiser(torch.bfloat16).named_parameters()}
    assert {name: found[name] for name in base} == base and torch.float32 in base.values()
    assert {dtype for name, dtype in found.items() if ".lora_" in name} == {torch.bfloat16}


@pytest.mark.parametrize(("frames", "advice"), [(16, "13 or 17"), (2, "1 or 5"), (84, "81 or 85"), (4, "1 or 5")])
def test_frames_that_are_not_4k_and_1(frames, advice, plain):
    with pytest.raises(UserError, match=rf"frames: {frames}, but .* makes videos of 4k \+ 1 frames: set it to {advice}"):
        open_model(str(plain), frames=frames)


@pytest.mark.parametrize("frames", [1, 5, 81])
def test_frames_that_are(frames, plain):
    assert open_model(str(plain), frames=frames).latent_shape(32, frames)[1] == (frames - 1) // 4 + 1


def test_more_positions_than_the_transformer_has(plain):
    model = open_model(str(plain), frames=125)
    with pytest.raises(UserError, match=r"129 frames need 33 positions, and its transformer has 32 \(rope_max_seq_len\)"):
        model.check_frames(129)
    model.check_side(256)
    with pytest.raises(UserError, match=r"272 pixels along a side need 34 positions"):
        model.check_side(272)


CHANGES = {
    "two experts": ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875},
                    "two transformers .*A14B"),
    "image to video": ("model_index.json", {"_class_name": "WanImageToVideoPipeline"},
                       "WanImageToVideoPipeline', which is given a picture or a video"),
    "VACE": ("model_index.json", {"_class_name": "WanVACEPipeline"}, "WanVACEPipeline', which is given a picture"),
    "channels for an image": ("transformer/config.json", {"in_channels": 36}, "in_channels is 36"),
    "an image's embedding": ("transformer/config.json", {"image_dim": 1280}, "image_dim is 1280"),
    "keys of an image": ("transformer/config.json", {"added_kv_proj_dim": 24}, "added_kv_proj_dim is 24"),
    "another text encoder": ("transformer/config.json", {"text_dim": 32}, "text_dim is 32, but text_encoder makes it 24"),
    "patches in time": ("transformer/config.json", {"patch_size": [2, 2, 2]}, "patch_size is"),
    "oblong patches": ("transformer/config.json", {"patch_size": [1, 1, 2]}, "patch_size is"),
    "no mean": ("vae/config.json", {"latents_mean": [0.0] * 3}, "latents_mean and latents_std must be 4 numbers"),
    "std of zero": ("vae/config.json", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std"),
    "pixels a latent": ("vae/config.json", {"scale_factor_spatial": 8}, "scale_factor_spatial is 8"),
    "frames a latent": ("vae/config.json", {"scale_factor_temporal": 8}, "scale_factor_temporal is 8"),
    "channels of pixels": ("vae/config.json", {"patch_size": 2, "scale_factor_spatial": 8}, "in_channels is 3"),
    "halved once": ("vae/config.json", {"temperal_downsample": [False, True], "scale_factor_temporal": 2}, "four frames at a time"),
    "dynamic shift": ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    "no flow": ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "follows no flow"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_refused_directories(case, plain, tmp_path):
    name, change, message = CHANGES[case]
    shutil.copytree(plain, tmp_path / "wan")
    file = tmp_path / "wan" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        open_model(str(tmp_path / "wan"), frames=5)


def test_a_missing_shard_is_named(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "wan")
    folder = tmp_path / "wan" / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    WanTransformer3DModel.from_pretrained(plain / "transformer").save_pretrained(folder, max_shard_size="20KB")
    last = max(folder.glob("*-of-*"))
    last.unlink()
    with pytest.raises(UserError, match=f"shards, of which 1 are missing: {last.name}"):
        open_model(str(tmp_path / "wan"), frames=5)


def test_a_tokens_time_needs_patches_of_two(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "wan")
    for name, change in (("model_index.json", {"expand_timesteps": True}), ("transformer/config.json", {"patch_size": [1, 1, 1]})):
        file = tmp_path / "wan" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match="of 2 x 2 where model_index.json has expand_timesteps"):
        open_model(str(tmp_path / "wan"), frames=5)


def test_sizes_are_of_videos(plain):
    assert open_model(str(plain), frames=5).latent_shape(32, 5) == WAN_LATENTS
