"""Qwen-Image against its diffusers pipeline: prompts, latents, samples, exports, guidance and the mask."""

import json

import pytest
import torch
from diffusers import QwenImagePipeline, UniPCMultistepScheduler
from models.flow_samples import ours
from tiny import LATENTS
from tiny_qwen import TOKENS, tiny_qwen

from seppo_fast.config import Lora
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.export import save_pipeline
from seppo_fast.models.lora import add_lora, trainable_weights
from seppo_fast.reference.solver import table_of

PROMPTS = ["a red cat", "", "the photo of two dogs, <|im_end|> {} and the sky", "sky " * 600]
THREE = ["a red cat", "the sky and a dog of the handwritten zero", ""]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def pipeline_of(folder, **changes):
    pipeline = QwenImagePipeline.from_pretrained(folder, **changes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture(scope="module")
def model(folder):
    return open_model(str(folder))


@pytest.fixture(scope="module")
def pipeline(folder):
    return pipeline_of(folder)


def test_facts_of_the_directory(model, folder, pipeline):
    assert (model.path, model.latent_channels, model.vae_scale_factor, model.multiple) == (folder, 4, 2, 4)
    assert pipeline.vae_scale_factor == 2 and pipeline.default_sample_size == model.sample_size
    assert (model.denoiser, model.num_train_timesteps, model.prediction_type, model.video) == ("transformer", 1000, "flow", False)
    assert model.latent_shape(16, 1) == LATENTS


@torch.no_grad()
def test_prompts_as_the_pipeline_encodes_them(model, pipeline):
    got = model.load_text("cpu")(PROMPTS)
    embeds, mask = pipeline.encode_prompt(PROMPTS, device="cpu", max_sequence_length=TOKENS)
    assert {name: tuple(value.shape) for name, value in got.items()} == {
        name: (len(PROMPTS), *shape) for name, shape in model.condition_shapes.items()}
    assert torch.equal(got["prompt_embeds"], embeds) and torch.equal(got["mask"], mask.float())
    assert len(embeds.unique(dim=0)) == len(PROMPTS) and not got["prompt_embeds"].requires_grad
    assert not got["prompt_embeds"][got["mask"] == 0].any() and got["mask"].sum(1).unique().numel() > 2


@torch.no_grad()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_does_not_depend_on_the_others(prompt, model):
    """Alone the pipeline pads nothing and gives no mask; a text encoder's sums may differ in rounding."""
    embed = model.load_text("cpu")
    alone, beside = embed([prompt]), embed([prompt, *PROMPTS])
    assert torch.equal(alone["mask"], beside["mask"][:1]) and alone["mask"].sum() >= 5
    torch.testing.assert_close(alone["prompt_embeds"], beside["prompt_embeds"][:1], atol=1e-5, rtol=1e-5)


def test_as_many_tokens_as_the_pipeline_takes_by_default(tmp_path):
    folder = tiny_qwen(tmp_path / "qwen")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 131072}))
    model = open_model(str(folder))
    assert model.condition_shapes == {"prompt_embeds": (512, 32), "mask": (512,)} and model.prompt_tokens == {"text_encoder": 512}
    with torch.no_grad():
        wanted, _ = pipeline_of(folder).encode_prompt(PROMPTS, device="cpu", max_sequence_length=512)
    assert torch.equal(model.load_text("cpu")(PROMPTS)["prompt_embeds"], wanted)


def given(model, seed=2):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 6, 8, generator=random), torch.tensor([900.0, 30.0])


@torch.no_grad()
def test_padding_with_the_mask_is_no_padding(model, pipeline):
    denoiser, (latents, times) = model.load_denoiser(torch.float32).eval(), given(model)
    conditions = model.load_text("cpu")(THREE[:2])
    got = model.denoise(denoiser, latents, times, conditions)
    for row, prompt in enumerate(THREE[:2]):
        embeds, mask = pipeline.encode_prompt([prompt], device="cpu")
        assert mask is None and embeds.shape[1] < TOKENS
        packed = pipeline._pack_latents(latents[row:row + 1], 1, 4, 6, 8)
        alone = pipeline.transformer(hidden_states=packed, timestep=times[row:row + 1] / 1000, encoder_hidden_states=embeds,
                                     img_shapes=[[(1, 3, 4)]], return_dict=False)[0]
        wanted = pipeline._unpack_latents(alone, 12, 16, 2)[:, :, 0]
        torch.testing.assert_close(got[row:row + 1], wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_lies_behind_a_prompt_is_not_seen(model):
    denoiser, (latents, times) = model.load_denoiser(torch.float32).eval(), given(model)
    conditions = model.load_text("cpu")(THREE[:2])
    wanted = model.denoise(denoiser, latents, times, conditions)
    behind = torch.where(conditions["mask"][..., None] > 0, conditions["prompt_embeds"], 50.0)
    torch.testing.assert_close(model.denoise(denoiser, latents, times, conditions | {"prompt_embeds": behind}), wanted)
    without = model.denoise(denoiser, latents, times, conditions | {"mask": torch.ones_like(conditions["mask"])})
    assert (without - wanted).abs().max() > 1e-4, "the mask makes a difference"


@torch.no_grad()
def test_vae_both_ways(model, pipeline):
    vae, config = model.load_vae("cpu"), pipeline.vae.config
    assert vae.dtype == torch.float32 and not vae.training
    pixels = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = model.encode(vae, pixels, at_once=2)
    posterior = pipeline.vae.encode(pixels[:, :, None]).latent_dist
    torch.testing.assert_close(mean, posterior.mean[:, :, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, posterior.std[:, :, 0], atol=1e-5, rtol=1e-5)
    latents = model.latent_scale.scaled(mean)
    means, stds = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(latents, (mean - means) / stds)  # as QwenImageImg2ImgPipeline does
    assert latents.shape == (3, 4, 8, 12)
    image = pipeline.vae.decode((latents * stds + means)[:, :, None]).sample[:, :, 0]
    torch.testing.assert_close(model.decode(vae, latents), pipeline.image_processor.denormalize(image), atol=1e-5, rtol=1e-5)


def theirs(pipeline, prompts, noise, solver, steps, scale):
    """The pipeline's latents, with the solver that a user of diffusers would put into it."""
    before, (height, width) = pipeline.scheduler, noise.shape[-2:]
    if solver == "unipc":
        pipeline.scheduler = UniPCMultistepScheduler.from_config(before.config, **FLOW, flow_shift=before.config.shift)
    try:
        found = pipeline(prompts, negative_prompt=[""] * len(prompts), true_cfg_scale=scale, num_inference_steps=steps,
                         latents=pipeline._pack_latents(noise, *noise.shape), height=2 * height, width=2 * width,
                         output_type="latent", max_sequence_length=TOKENS).images
    finally:
        pipeline.scheduler = before
    return pipeline._unpack_latents(found, 2 * height, 2 * width, 2)[:, :, 0]


@pytest.fixture(scope="module", params=["published", "static"])
def timed(request, folder, tmp_path_factory):
    """A directory whose times are shifted by the number of tokens down to a least one, or by a fixed number."""
    if request.param == "static":
        folder = tiny_qwen(tmp_path_factory.mktemp("models") / "static",
                           scheduler=dict(shift=3.0, use_dynamic_shifting=False, shift_terminal=None))
    return open_model(str(folder)), pipeline_of(folder)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(("solver", "steps"), [("euler", 4), ("euler", 8), ("unipc", 4), ("unipc", 8)])
def test_samples_are_the_pipeline_s(solver, steps, scale, timed):
    model, pipeline = timed
    noise = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    got, wanted = ours(model, THREE, noise, solver, steps, scale), theirs(pipeline, THREE, noise, solver, steps, scale)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - noise).abs().max() > 0.1


def test_times_end_where_the_scheduler_says(model):
    table = table_of(model, "euler", 8, (4, 64, 64))
    assert table.timesteps[-1] == pytest.approx(20, abs=1e-3) and table.timesteps[0] == 1000
    with pytest.raises(UserError, match="'dpmsolver\\+\\+' does not know the shift_terminal"):
        table_of(model, "dpmsolver++", 8, (4, 64, 64))


def test_dpm_solver_without_a_least_time(tmp_path):
    """The pipeline does not take it; it has its own steps, shifted as the others'."""
    model = open_model(str(tiny_qwen(tmp_path / "qwen", scheduler=dict(shift_terminal=None))))
    first = table_of(model, "dpmsolver++", 4, (4, 64, 64)).timesteps
    assert len(first) == 4 and first[0] > 990 and bool((first.diff() < 0).all())


def test_guided_tokens_are_as_long_as_the_prompt_s(model, pipeline):
    random = torch.Generator().manual_seed(4)
    guided_output, conditional = torch.randn(2, 2, 4, 6, 8, generator=random)
    guided_output[0, :, :2, :2] = 0
    found = model.rescale_guidance(guided_output, conditional)
    combined, cond = (pipeline._pack_latents(each, 2, 4, 6, 8) for each in (guided_output, conditional))
    wanted = combined * (cond.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(pipeline._pack_latents(found, 2, 4, 6, 8), wanted.nan_to_num(0.0))
    assert wanted.isnan().any() and found.isfinite().all(), "a token of zeros has no direction"


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
    noise = torch.randn(1, *LATENTS, generator=random)
    before = theirs(pipeline, ["a cat"], noise, "euler", 3, 2.0)
    if lora is not None:
        found.load_lora_weights(tmp_path / "final")
    wanted = ours(model, ["a cat"], noise, "euler", 3, 2.0, denoiser)
    got = theirs(found, ["a cat"], noise, "euler", 3, 2.0)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - before).abs().max() > 1e-3
