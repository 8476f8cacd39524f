"""Stable Diffusion 3 and FLUX do what diffusers' own pipelines do with the same directory."""

import json
from itertools import product

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from models.flow_samples import ours
from tiny import LATENTS, tiny_flux, tiny_sd3

from seppo_fast.config import Lora, Seppo
from seppo_fast.models import open_model
from seppo_fast.models.export import save_pipeline
from seppo_fast.models.lora import add_lora, trainable_weights
from seppo_fast.training.card import usage

PROMPTS = ["a photo of the red cat", "two dogs", "", "sky " * 600]
PIPELINES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SOLVERS = {"unipc": UniPCMultistepScheduler, "dpmsolver++": DPMSolverMultistepScheduler}


def pipeline_of(folder, **changes):
    """diffusers' own pipeline of a directory."""
    kind = PIPELINES["flux" if "Flux" in json.loads((folder / "model_index.json").read_text())["_class_name"] else "sd3"]
    pipeline = kind.from_pretrained(folder, **changes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=["sd3", "flux"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(scope="module")
def model(folder):
    return open_model(str(folder))


@pytest.fixture(scope="module")
def pipeline(folder):
    return pipeline_of(folder)


@torch.no_grad()
def encoded(pipeline, prompts):
    """Embeddings and pooled embeddings, by the pipeline."""
    if isinstance(pipeline, FluxPipeline):
        return pipeline.encode_prompt(prompts, None, device="cpu")[:2]
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, device="cpu", do_classifier_free_guidance=False)
    return embeds, pooled


def test_facts_of_the_directory(model, folder):
    assert (model.path, model.latent_channels, model.vae_scale_factor, model.multiple) == (folder, 4, 2, 4)
    assert (model.denoiser, model.num_train_timesteps, model.prediction_type, model.video) == ("transformer", 1000, "flow", False)
    vae = json.loads((folder / "vae" / "config.json").read_text())
    assert (model.latent_scale.factor, model.latent_scale.shift) == (vae["scaling_factor"], vae["shift_factor"])


def test_prompts_as_the_pipeline_encodes_them(model, pipeline):
    got = model.load_text("cpu")(PROMPTS)
    embeds, pooled = encoded(pipeline, PROMPTS)
    assert {name: tuple(value.shape) for name, value in got.items()} == {
        name: (len(PROMPTS), *shape) for name, shape in model.condition_shapes.items()}
    assert torch.equal(got["prompt_embeds"], embeds) and torch.equal(got["pooled"], pooled)
    assert len(embeds.unique(dim=0)) == len(PROMPTS) and not got["prompt_embeds"].requires_grad


@torch.no_grad()
def test_the_empty_prompt_is_the_negative_one_of_guidance(sd3_folder):
    _, negative, _, pooled = pipeline_of(sd3_folder).encode_prompt("a cat", None, None, device="cpu")
    got = open_model(str(sd3_folder)).load_text("cpu")([""])
    assert torch.equal(got["prompt_embeds"], negative) and torch.equal(got["pooled"], pooled)


def test_vae_both_ways(model, pipeline):
    vae = model.load_vae("cpu")
    assert vae.dtype == torch.float32 and not vae.training
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = model.encode(vae, pixels)
    latents = model.latent_scale.scaled(mean)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        wanted = (posterior.mean - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor  # as img2img does
        image = pipeline.vae.decode(wanted / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor).sample
    assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std) and mean.shape == (2, 4, 8, 12)
    torch.testing.assert_close(latents, wanted)
    torch.testing.assert_close(model.decode(vae, latents), pipeline.image_processor.denormalize(image))


def without_t5(pipeline, folder):
    """The directory of a Stable Diffusion 3 pipeline that goes without T5."""
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    pipeline.register_to_config(text_encoder_3=(None, None), tokenizer_3=(None, None))
    pipeline.save_pretrained(folder)
    return folder


def test_stable_diffusion_3_without_t5(sd3_folder, tmp_path):
    folder = without_t5(pipeline_of(sd3_folder), tmp_path / "sd3")
    assert not (folder / "text_encoder_3").exists()
    model = open_model(str(folder))
    got = model.load_text("cpu")(PROMPTS)
    card: dict = {"FOLDER": folder}
    exec(usage(Seppo(model={"path": str(folder)}), model).removeprefix("```python").removesuffix("```"), card)
    embeds, pooled = encoded(card["pipeline"], PROMPTS)
    assert torch.equal(got["prompt_embeds"], embeds) and torch.equal(got["pooled"], pooled)
    assert got["prompt_embeds"].shape == (len(PROMPTS), *model.condition_shapes["prompt_embeds"])
    assert not got["prompt_embeds"][:, 77:].any()


def theirs(pipeline, prompts, noise, solver, steps, scale):
    """The pipeline's latents, with the solver that a user of diffusers would put into it."""
    before, (height, width) = pipeline.scheduler, noise.shape[-2:]
    if solver != "euler":
        pipeline.scheduler = SOLVERS[solver].from_config(before.config, **FLOW, flow_shift=before.config.shift)
    flux = isinstance(pipeline, FluxPipeline)
    given = FluxPipeline._pack_latents(noise, *noise.shape) if flux else noise
    try:
        found = pipeline(prompts, latents=given, num_inference_steps=steps, guidance_scale=scale, height=2 * height,
                         width=2 * width, output_type="latent").images
    finally:
        pipeline.scheduler = before
    return FluxPipeline._unpack_latents(found, 2 * height, 2 * width, 2) if flux else found


@pytest.fixture(scope="module")
def with_times(tmp_path_factory, sd3_folder, flux_folder):
    """`with_times(name, dynamic)`: a directory whose times are shifted by the number of tokens, or by a fixed number."""
    folders = {("sd3", False): sd3_folder, ("flux", True): flux_folder}

    def make(name, dynamic):
        if (name, dynamic) not in folders:
            place = tmp_path_factory.mktemp("models") / name
            if name == "flux":  # as FLUX.1-schnell: no embedding of the guidance scale either
                tiny_flux(place, dynamic=False, guidance_embeds=False)
            else:
                file = tiny_sd3(place) / "scheduler" / "scheduler_config.json"
                file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": True}))
            folders[name, dynamic] = place
        return open_model(str(folders[name, dynamic])), pipeline_of(folders[name, dynamic])

    return make


# FluxPipeline gives every scheduler a mu, which these two refuse without dynamic shifting.
CASES = [case for case in product([("sd3", False, 1.0), ("sd3", False, 5.0), ("sd3", True, 5.0), ("flux", True, 1.0),
                                   ("flux", True, 3.5), ("flux", False, 1.0)], ["euler", *SOLVERS], [4, 8])
         if case[0][:2] != ("flux", False) or case[1] == "euler"]


@pytest.mark.parametrize(("case", "solver", "steps"), CASES)
def test_samples_are_the_pipeline_s(case, solver, steps, with_times):
    name, dynamic, scale = case
    model, pipeline = with_times(name, dynamic)
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(3))
    got, wanted = (draw(given, ["a red cat"], noise, solver, steps, scale) for draw, given in ((ours, model), (theirs, pipeline)))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - noise).abs().max() > 0.1


def trained(denoiser):
    """Other weights, as training would leave them."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_weights(denoiser).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    return denoiser


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=6.0)])
def test_what_is_exported_is_loaded_by_diffusers(lora, model, folder, tmp_path):
    denoiser = model.load_denoiser(torch.float32)
    if lora is not None:
        add_lora(denoiser, lora, seed=0)
    weights = dict(trainable_weights(trained(denoiser)))
    save_pipeline(model, weights, tmp_path / "final", lora, "")
    pipeline = pipeline_of(folder if lora else tmp_path / "final")
    noise = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(3))
    before = theirs(pipeline_of(folder), ["a cat"], noise, "euler", 3, 2.0)
    if lora is not None:
        pipeline.load_lora_weights(tmp_path / "final")
    wanted = ours(model, ["a cat"], noise, "euler", 3, 2.0, denoiser)
    got = theirs(pipeline, ["a cat"], noise, "euler", 3, 2.0)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert (got - before).abs().max() > 1e-3
