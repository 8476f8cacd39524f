"""Stable Diffusion and SDXL do what diffusers' own pipelines do with the same directory."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny import LATENTS, tiny_sd

from seppo_fast.models import StableDiffusion, StableDiffusionXL, alphas_cumprod, open_model
from seppo_fast.models.published import PUBLISHED, published_model

PROMPTS = ["a photo of the red cat", "two dogs", "", "sky " * 200]


@pytest.fixture(scope="module")
def sd(sd_folder):
    return open_model(str(sd_folder))


@pytest.fixture(scope="module")
def sdxl(sdxl_folder):
    return open_model(str(sdxl_folder))


@pytest.fixture(scope="module")
def sd_pipeline(sd_folder):
    return StableDiffusionPipeline.from_pretrained(sd_folder)


@pytest.fixture(scope="module")
def sdxl_pipeline(sdxl_folder):
    return StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)


def test_facts_of_the_directory(sd, sdxl, sd_folder):
    assert isinstance(sd, StableDiffusion) and isinstance(sdxl, StableDiffusionXL)
    assert (sd.name, sdxl.name, sd.path) == ("sd", "sdxl", sd_folder)
    for model, scaling in ((sd, 0.18215), (sdxl, 0.13025)):
        assert model.prediction_type == "epsilon"
        assert model.num_train_timesteps == 1000
        assert (model.latent_channels, model.vae_scale_factor, model.latent_scale.factor) == (4, 2, scaling)
    assert sd.scheduler_config["_class_name"] == "PNDMScheduler"


def test_v_prediction_is_read(tmp_path):
    assert open_model(str(tiny_sd(tmp_path / "v", prediction_type="v_prediction"))).prediction_type == "v_prediction"


def test_sd_prompts_as_the_pipeline_encodes_them(sd, sd_pipeline):
    got = sd.load_text("cpu")(PROMPTS)
    wanted, unconditional = sd_pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    assert set(got) == {"prompt_embeds"} and got["prompt_embeds"].shape == (4, 77, 32)
    torch.testing.assert_close(got["prompt_embeds"], wanted)
    torch.testing.assert_close(got["prompt_embeds"][2], unconditional[0])
    assert not got["prompt_embeds"].requires_grad


def test_sdxl_prompts_as_the_pipeline_encodes_them(sdxl, sdxl_pipeline):
    got = sdxl.load_text("cpu")(PROMPTS)
    wanted, zeros, pooled, pooled_zeros = sdxl_pipeline.encode_prompt(PROMPTS, device="cpu")
    assert got["prompt_embeds"].shape == (4, 77, 80) and got["pooled"].shape == (4, 40)
    rows = [0, 1, 3]  # the empty prompt is the unconditional one, which the pipeline keeps apart
    torch.testing.assert_close(got["prompt_embeds"][rows], wanted[rows])
    torch.testing.assert_close(got["pooled"][rows], pooled[rows])
    assert torch.equal(got["prompt_embeds"][2], zeros[2]) and torch.equal(got["pooled"][2], pooled_zeros[2])
    assert not got["prompt_embeds"][2].any() and got["prompt_embeds"][0].any()


def test_sdxl_without_forced_zeros_encodes_the_empty_prompt(own_sdxl, sdxl_pipeline):
    index = own_sdxl / "model_index.json"
    setting = '"force_zeros_for_empty_prompt": '
    index.write_text(index.read_text().replace(f"{setting}true", f"{setting}false"))
    got = open_model(str(own_sdxl)).load_text("cpu")([""])
    wanted, _, pooled, _ = sdxl_pipeline.encode_prompt([""], device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(got["prompt_embeds"], wanted)
    torch.testing.assert_close(got["pooled"], pooled)


def test_text_dtype(sd):
    assert sd.load_text("cpu", torch.bfloat16)(["a cat"])["prompt_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_vae_both_ways(name, request):
    model, pipeline = request.getfixturevalue(name), request.getfixturevalue(f"{name}_pipeline")
    vae = model.load_vae("cpu")
    assert vae.dtype == torch.float32 and not vae.training and not any(p.requires_grad for p in vae.parameters())
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = model.encode(vae, pixels)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        latents = mean * model.latent_scale.factor
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert mean.shape == std.shape == (2, 4, 8, 12) and mean.dtype == torch.float32
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)
    decoded = model.decode(vae, latents)
    torch.testing.assert_close(decoded, pipeline.image_processor.denormalize(image))
    assert decoded.shape == pixels.shape and decoded.min() >= 0 and decoded.max() <= 1
    torch.testing.assert_close(model.encode(vae, pixels.half())[0], mean, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_plain_guided_loop_equals_the_pipeline(name, request):
    """Prompts, conditions, time ids, the network's output and the VAE at once, against the pipeline's own call."""
    model, pipeline = request.getfixturevalue(name), request.getfixturevalue(f"{name}_pipeline")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(3))
    prompts = ["a red cat", "the sky"]
    wanted = pipeline(prompts, latents=noise, num_inference_steps=4, guidance_scale=3.0, height=16, width=16,
                      output_type="pt").images

    unet, embed, vae = model.load_denoiser(torch.float32), model.load_text("cpu"), model.load_vae("cpu")
    conditions = embed([*prompts, "", ""])
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(4)
    latents = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model.denoise(unet, torch.cat([latents, latents]), t.expand(4), conditions)
            conditional, unconditional = output.chunk(2)
            guided = unconditional + 3.0 * (conditional - unconditional)
            latents = scheduler.step(guided, t, latents).prev_sample
    torch.testing.assert_close(model.decode(vae, latents), wanted, atol=1e-4, rtol=1e-4)


def test_sdxl_time_ids_are_pixels_height_first(sdxl):
    ids = sdxl.time_ids(torch.zeros(3, 4, 8, 12, dtype=torch.bfloat16))
    assert ids.dtype == torch.float32 and ids.tolist() == [[16.0, 24.0, 0.0, 0.0, 16.0, 24.0]] * 3


def test_unet_is_new_each_time_and_trainable(sd):
    first, second = sd.load_denoiser(torch.bfloat16), sd.load_denoiser(torch.float32)
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16} and first.device.type == "cpu"
    assert all(p.requires_grad and not p.is_meta for p in second.parameters())
    with torch.no_grad():
        second.conv_in.weight.zero_()
    assert sd.load_denoiser(torch.float32).conv_in.weight.abs().sum() > 0


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_denoise_in_half_precision_trains(name, request):
    model = request.getfixturevalue(name)
    unet = model.load_denoiser(torch.bfloat16)
    conditions = {key: value.bfloat16() for key, value in model.load_text("cpu")(["a cat", ""]).items()}
    output = model.denoise(unet, torch.randn(2, *LATENTS).bfloat16(), torch.tensor([3, 999]), conditions)
    assert output.shape == (2, *LATENTS) and output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0


def test_alphas_cumprod():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    alphas = alphas_cumprod(config)
    assert alphas.dtype == torch.float32 and alphas.shape == (1000,)
    torch.testing.assert_close(alphas.double(), (1 - betas).cumprod(0), atol=1e-6, rtol=1e-4)
    assert alphas_cumprod(config | {"rescale_betas_zero_snr": True})[-1] == 0 < alphas[-1]


def test_fingerprint_files_decide_the_cache(sd, sdxl):
    names = {str(path.relative_to(sdxl.path)) for path in sdxl.fingerprint_files()}
    assert {"vae/config.json", "text_encoder/model.safetensors", "text_encoder_2/model.safetensors",
            "tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json", "model_index.json",
            "vae/diffusion_pytorch_model.safetensors"} <= names
    assert not any(name.startswith(("unet", "scheduler")) for name in names)
    for model in (sd, sdxl):
        files = model.fingerprint_files()
        assert all(path.is_file() for path in files) and len(set(files)) == len(files)
        assert files == open_model(str(model.path)).fingerprint_files()


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_of_published_models_need_no_files(name):
    model = published_model(name)
    with torch.device("meta"):
        vae = model.empty_vae()
    assert sum(weight.numel() for weight in vae.parameters()) > 5e7
    assert model.latent_shape(512, 17)[-2:] == (512 // model.vae_scale_factor,) * 2


@pytest.mark.parametrize(("name", "pixels"), [("stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
                                              ("stabilityai/stable-diffusion-xl-base-1.0", 1024),
                                              ("stabilityai/stable-diffusion-3.5-medium", 1024),
                                              ("black-forest-labs/FLUX.1-dev", 1024)])
def test_published_vaes_take_pictures_in_tiles_of_their_own_size(name, pixels):
    model = published_model(name)
    with torch.device("meta"):
        assert model.empty_vae().tile_sample_min_size == pixels
