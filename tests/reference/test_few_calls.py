"""Fewer network calls a sample: guidance in an interval, a kept branch, solvers that add noise, adapters while it draws."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, TCDScheduler
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_sd
from torch import Tensor

from seppo_fast.config import Sampler as Settings
from seppo_fast.errors import UserError
from seppo_fast.evaluation.adapters import read_adapter
from seppo_fast.models import Model, open_model
from seppo_fast.reference import Sampler
from seppo_fast.reference.adapter import beside
from seppo_fast.reference.calls import calls_of, evaluations
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import rollout_table
from seppo_fast.training.adapter import adapted_network

PROMPTS = ["a handwritten one", "a handwritten two", "seven"]
TARGETS = ["to_q", "to_v", "to_out.0", "conv1", "proj_in"]
CLASSES = {"lcm": LCMScheduler, "tcd": TCDScheduler}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("few") / "sd")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return open_model(str(folder))


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on linear layers and convolutions, of rank 3 and alpha 6, that changes much."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    torch.manual_seed(5)
    out = tmp_path_factory.mktemp("lora")
    for name, weight in pipeline.unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
                                              unet_lora_adapter_metadata={"r": 3, "lora_alpha": 6, "target_modules": TARGETS})
    return out / "pytorch_lora_weights.safetensors"


def noise_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def sampler_of(model: Model, settings: Settings, lora: Path | None = None) -> tuple[Sampler, dict[str, Tensor]]:
    embed, unet = model.load_text("cpu"), model.load_denoiser(torch.float32).eval()
    empty = embed([""])
    denoise, guidance = guided(model, settings.guidance_scale, empty)
    adapted = [] if lora is None else beside(unet, adapted_network(read_adapter(lora, model), model), "cpu", torch.float32)
    table = rollout_table(model, settings, (4, 8, 8))
    return Sampler(unet, denoise, table, empty, guidance, settings, torch.float32, adapted=adapted), embed(PROMPTS)


@pytest.mark.parametrize("interval", [[0.3, 0.8], [0.0, 0.5], [0.55, 1.0]])
def test_guidance_in_an_interval_is_diffusers_pipeline_called_so(model, folder, interval):
    """The pipeline's own way: a callback changes its guidance scale, and with it the number of rows, from step to step."""
    settings = Settings(steps=6, guidance_scale=3.0, guidance_interval=interval, batch_size=3)
    sampler, conditions = sampler_of(model, settings)
    assert 0 < sampler.calls.count("all") < 6 and set(sampler.calls) == {"all", "prompt"}
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    empty = pipeline.encode_prompt([""] * 3, "cpu", 1, False)[0]
    scheduler = pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    latents, noise = noise_of(3), noise_of(3)
    scheduler.set_timesteps(6)
    got = sampler.draw(noise, conditions)
    inside = [interval[0] <= t / 1000 <= interval[1] for t in scheduler.timesteps.tolist()]
    assert [call == "all" for call in sampler.calls] == inside
    for t, guides in zip(scheduler.timesteps, inside, strict=True):
        with torch.no_grad():
            prompted = pipeline.unet(latents, t, conditions["prompt_embeds"]).sample
            without = pipeline.unet(latents, t, empty).sample
        latents = scheduler.step(without + 3.0 * (prompted - without) if guides else prompted, t, latents).prev_sample
    torch.testing.assert_close(got, latents, rtol=1e-4, atol=1e-4)


def test_the_whole_interval_is_the_plain_loop_to_the_bit(model):
    noise = noise_of(3)
    plain, conditions = sampler_of(model, Settings(steps=4, guidance_scale=3.0, batch_size=2))
    whole, _ = sampler_of(model, Settings(steps=4, guidance_scale=3.0, batch_size=2, guidance_interval=[0.0, 1.0]))
    assert plain.calls == ("all",) * 4
    assert torch.equal(plain.draw(noise, conditions), whole.draw(noise, conditions))


def test_a_branch_is_kept_between_its_turns(model):
    settings = Settings(steps=5, guidance_scale=3.0, unconditional_every=2, guidance_interval=[0.0, 0.7], batch_size=3)
    sampler, conditions = sampler_of(model, settings)
    assert sampler.calls == ("prompt", "all", "kept", "all", "kept")
    assert evaluations(sampler.calls, sampler.guidance) == 7
    table, unet, denoise = sampler.table, sampler.module, model.denoise
    known, without = [noise_of(3)], None
    empty = model.load_text("cpu")([""] * 3)
    for i, call in enumerate(sampler.calls):
        latents = sum(weight * term for weight, term in zip(table.inputs[i], known, strict=False))
        with torch.no_grad():
            prompted = denoise(unet, latents, table.timesteps[i].expand(3), conditions)
            without = denoise(unet, latents, table.timesteps[i].expand(3), empty) if call == "all" else without
        known.append(prompted if call == "prompt" else without + 3.0 * (prompted - without))
    want = sum(weight * term for weight, term in zip(table.outputs[-1], known, strict=True))
    torch.testing.assert_close(sampler.draw(noise_of(3), conditions), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("solver", CLASSES)
def test_solvers_that_add_noise_are_diffusers_own_loop(model, lora, folder, solver, steps):
    settings = Settings(solver=solver, steps=steps, adapter=str(lora), batch_size=2)
    assert settings.guidance_scale == 1
    sampler, conditions = sampler_of(model, settings, lora)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.load_lora_weights(lora.parent)
    scheduler = CLASSES[solver].from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps)
    drawn, latents = torch.Generator().manual_seed(9), noise_of(3)
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = pipeline.unet(latents, t, conditions["prompt_embeds"]).sample
        latents = scheduler.step(output, t, latents, generator=drawn).prev_sample
    again = torch.Generator().manual_seed(9)
    noises = [randn_tensor((3, 4, 8, 8), generator=again) for _ in range(steps - 1)]
    got = sampler.draw(noise_of(3), conditions, later=lambda i: noises[i])
    torch.testing.assert_close(got, latents, rtol=1e-4, atol=1e-4)


def test_an_adapter_holds_while_it_draws_alone(model, lora, tmp_path):
    settings = partial(Settings, solver="euler", steps=3, batch_size=2, guidance_scale=2.0)
    plain, conditions = sampler_of(model, settings())
    adapted, _ = sampler_of(model, settings(adapter=str(lora)), lora)
    before = {name: weight.clone() for name, weight in adapted.module.named_parameters()}
    want = plain.draw(noise_of(3), conditions)
    assert (adapted.draw(noise_of(3), conditions) - want).abs().max() > 0.05
    assert before.keys() == dict(adapted.module.named_parameters()).keys()
    given = noise_of(2), torch.tensor([300, 20]), {"prompt_embeds": conditions["prompt_embeds"][:2]}
    with torch.no_grad():
        assert torch.equal(model.denoise(adapted.module, *given), model.denoise(plain.module, *given)), "what scores stays clean"
    zeros = {name: torch.zeros_like(value) if "lora_B" in name or "up" in name else value
             for name, value in load_file(lora).items()}
    save_file(zeros, tmp_path / "zeros.safetensors")
    nothing, _ = sampler_of(model, settings(adapter=str(tmp_path / "zeros.safetensors")), tmp_path / "zeros.safetensors")
    assert torch.equal(nothing.draw(noise_of(3), conditions), want), "an adapter of zeros is none"


def test_an_interval_without_a_step():
    with pytest.raises(UserError, match=r"none of the 2 steps lies in \[0.6, 0.8\]; they are at 0.9, 0.5"):
        calls_of([0.9, 0.5], 2, Settings(guidance_interval=[0.6, 0.8]))


def test_the_noises_must_be_those_of_the_solver(model, lora):
    sampler, conditions = sampler_of(model, Settings(solver="lcm", steps=4, adapter=str(lora)), lora)
    with pytest.raises(ValueError, match="the solver adds 3 noises on its way, and was given 0"):
        sampler.draw(noise_of(3), conditions)
