"""Guidance as branches: the sums that the papers write, and diffusers' own double guidance."""

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline

from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.reference import Branch, Guidance, classifier_free, double, sample, solver_table
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import SOLVERS, open_scheduler
from seppo_fast.sampling import FEW_STEPS
from tests.tiny import tiny_flux, tiny_sd, unet

NAMES = ("prompt_embeds", "image_latents")
OUTPUT = {(): 0.3, ("image_latents",): 1.1, ("image_latents", "prompt_embeds"): -0.7}  # by what is given


def total(guidance):
    return sum(branch.weight * OUTPUT[tuple(sorted(set(NAMES) - branch.empty))] for branch in guidance.branches)


@pytest.mark.parametrize("text,image,calls", [(3.5, 3.0, 3), (3.5, 1.0, 2), (2.0, 2.0, 2), (1.0, 1.0, 1), (1.0, 3.0, 3),
                                              (0.0, 1.0, 2), (3.5, 0.0, 3)])
def test_double_guidance_is_eq_9_and_drops_what_has_no_weight(text, image, calls):
    guidance = double(text, image, NAMES)
    without, alone, both = OUTPUT.values()
    assert total(guidance) == pytest.approx(without + image * (alone - without) + text * (both - alone), abs=1e-12)
    assert len(guidance) == calls


@pytest.mark.parametrize("scale,calls", [(7.5, 2), (1.0, 1), (0.0, 2), (0.5, 2)])
def test_classifier_free_guidance_drops_what_has_no_weight(scale, calls):
    guidance = classifier_free(scale, NAMES)
    without, _, both = OUTPUT.values()
    assert total(guidance) == pytest.approx(without + scale * (both - without), abs=1e-12) and len(guidance) == calls
    assert classifier_free(1.0, NAMES) == Guidance((Branch(1.0),))


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module")
def pix2pix(sd_folder):
    """diffusers' pipeline with a network whose image channels matter."""
    parts = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None).components
    torch.manual_seed(5)
    parts |= {"unet": unet(in_channels=8).eval()}
    pipeline = StableDiffusionInstructPix2PixPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver not in FEW_STEPS])  # these add noise on their way
def test_the_loop_draws_what_diffusers_pipeline_draws(solver, pix2pix, sd_folder):
    random = torch.Generator().manual_seed(3)
    noise, image = torch.randn(2, 4, 8, 8, generator=random), torch.rand(2, 3, 16, 16, generator=random)
    prompts, model = ["a red cat", "the sky"], open_model(str(sd_folder))
    pix2pix.scheduler = open_scheduler(model.scheduler_config, solver)
    theirs = pix2pix(prompts, image=image, num_inference_steps=4, guidance_scale=3.5, image_guidance_scale=3.0, latents=noise,
                     output_type="latent").images
    embed, table = model.load_text("cpu"), solver_table(model.scheduler_config, solver, 4)
    with torch.no_grad():
        mean, _ = model.encode(model.load_vae("cpu"), 2 * image - 1)
    given, empty = embed(prompts) | {"image_latents": mean}, embed([""]) | {"image_latents": torch.zeros(1, 4, 8, 8)}

    def denoise(latents, timesteps, conditions):
        return pix2pix.unet(torch.cat([latents, conditions["image_latents"]], 1), timesteps,
                            encoder_hidden_states=conditions["prompt_embeds"]).sample

    ours = sample(denoise, table, noise, given, empty, double(3.5, 3.0, empty), torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    other = sample(denoise, table, noise, given, empty, double(3.5, 1.0, empty), torch.float32)
    assert (other - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("embeds,scale,calls", [(True, 3.5, 1), (True, 1.0, 1), (False, 1.0, 1)])
def test_a_distilled_models_guidance_is_an_input(tmp_path, embeds, scale, calls):
    """Policy and reference are trained with the same scale, as the same function calls them."""
    model = open_model(str(tiny_flux(tmp_path / "flux", guidance_embeds=embeds)))
    denoise, guidance = guided(model, scale, NAMES)
    assert guidance == Guidance((Branch(1.0),)) and len(guidance) == calls
    network, random = model.load_denoiser(torch.float32), torch.Generator().manual_seed(0)
    given = (torch.randn(1, 4, 8, 8, generator=random), torch.tensor([400.0]),
             {name: torch.randn(1, *shape, generator=random) for name, shape in model.condition_shapes.items()})
    with torch.no_grad():
        assert torch.equal(denoise(network, *given), model.denoise(network, *given, guidance=scale))
        assert torch.equal(denoise(network, *given), model.denoise(network, *given)) == (scale == 1.0)


def test_a_scale_without_effect_is_refused(tmp_path):
    model = open_model(str(tiny_flux(tmp_path / "flux", guidance_embeds=False)))
    with pytest.raises(UserError, match=r"seppo.sampler.guidance_scale: 3.5 has no effect on .*guidance_embeds.*set it to 1"):
        guided(model, 3.5, NAMES)
    with pytest.raises(UserError, match="^--guidance-scale: 3.5 has no effect"):
        guided(model, 3.5, NAMES, "--guidance-scale")


def test_other_models_are_guided_by_a_second_call(sd_folder):
    model = open_model(str(sd_folder))
    denoise, guidance = guided(model, 7.5, NAMES)
    assert denoise == model.denoise and guidance == classifier_free(7.5, NAMES)
