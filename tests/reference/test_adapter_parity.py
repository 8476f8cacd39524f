"""Rollouts with an adapter are the samples of diffusers' own pipelines with `load_lora_weights`, from the same noises."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from diffusers.utils.torch_utils import randn_tensor
from evaluation.lora_files import Layers, kohya, peft
from safetensors.torch import save_file
from tiny import LATENTS, PIXELS, tiny_sd, tiny_sd3, tiny_sdxl
from torch import Tensor, nn

from seppo_fast.config import Sampler as Settings
from seppo_fast.evaluation.adapters import read_adapter
from seppo_fast.models import Model, open_model
from seppo_fast.reference import Sampler
from seppo_fast.reference.adapter import beside
from seppo_fast.reference.guidance import guided
from seppo_fast.reference.solver import rollout_table
from seppo_fast.training.adapter import adapted_network

PROMPTS = ["a handwritten one", "the blue dog", "sky"]
MAKE = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3}
ENDINGS = {"unet": ("to_q", "to_v", "to_out.0", "conv1", "proj_in"), "transformer": ("attn.to_q", "add_v_proj", "ff.net.2")}
SCHEDULERS = {"lcm": LCMScheduler, "tcd": TCDScheduler, "euler": EulerDiscreteScheduler}
RANK, STEPS = 2, 4


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    root, known = tmp_path_factory.mktemp("models"), {}

    def model_of(family: str) -> Model:
        if family not in known:
            known[family] = open_model(str(MAKE[family](root / family)))
        return known[family]

    return model_of


def layers(model: Model) -> Layers:
    """A LoRA of rank 2 on linear layers and convolutions that changes much."""
    random, made = torch.Generator().manual_seed(3), {}
    for name, layer in model.load_denoiser(torch.float32).named_modules():
        if name.endswith(ENDINGS[model.denoiser]) and isinstance(layer, nn.Linear | nn.Conv2d):
            out, into, *kernel = layer.weight.shape
            made[f"{model.denoiser}.{name}"] = (torch.randn(RANK, into, *kernel, generator=random) / into**0.5,
                                                torch.randn(out, RANK, *[1] * len(kernel), generator=random) / 4)
    return made


def by_us(model: Model, settings: Settings, lora: Path | None, noise: Tensor, later: Callable[[int], Tensor]) -> Tensor:
    embed, network = model.load_text("cpu"), model.load_denoiser(torch.float32).eval()
    empty = embed([""])
    denoise, guidance = guided(model, settings.guidance_scale, empty)
    adapted = [] if lora is None else beside(network, adapted_network(read_adapter(lora, model), model), "cpu", torch.float32)
    sampler = Sampler(network, denoise, rollout_table(model, settings, LATENTS), empty, guidance, settings, torch.float32,
                      adapted=adapted)
    return sampler.draw(noise, embed(PROMPTS), later=later)


def by_diffusers(model: Model, lora: Path | None, settings: Settings, noise: Tensor) -> Tensor:
    """The pipeline called as the adapter's authors do it."""
    pipeline = DiffusionPipeline.from_pretrained(model.path)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    if model.denoiser == "unet":
        spacing = {} if settings.spacing is None else {"timestep_spacing": settings.spacing}
        pipeline.scheduler = SCHEDULERS[settings.solver].from_config(pipeline.scheduler.config, **spacing)
    eta = {"eta": 0.3} if settings.solver == "tcd" else {}  # TCDScheduler's own; the pipeline's is 0
    return pipeline(PROMPTS, height=PIXELS, width=PIXELS, latents=noise.clone(), num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance_scale, generator=torch.Generator().manual_seed(9), output_type="latent",
                    **eta).images


@pytest.mark.parametrize("form", [peft, kohya], ids=["diffusers", "kohya"])
@pytest.mark.parametrize("family,solver,spacing", [
    ("sd", "lcm", None), ("sd", "tcd", None), ("sd", "euler", "trailing"), ("sdxl", "lcm", None), ("sdxl", "euler", "trailing"),
    ("sd3", "euler", None)])
def test_an_adapter_draws_what_the_pipeline_draws(opened, tmp_path, family, solver, spacing, form):
    model = opened(family)
    if family == "sd3" and form is kohya:
        pytest.skip("diffusers knows no such names of this family")
    lora = tmp_path / "few_steps.safetensors"
    save_file({name: value.contiguous() for name, value in form(layers(model)).items()}, lora)
    settings = Settings(solver=solver, steps=STEPS, spacing=spacing, adapter=str(lora), batch_size=2)
    assert settings.guidance_scale == 1
    noise, again = torch.randn(3, *LATENTS, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(9)
    later = [randn_tensor(noise.shape, generator=again) for _ in range(STEPS - 1)] if solver in ("lcm", "tcd") else []
    got = by_us(model, settings, lora, noise, later.__getitem__)
    want = by_diffusers(model, lora, settings, noise)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    plain = by_diffusers(model, None, settings, noise)
    assert (want - plain).abs().max() > 0.05, "the adapter shows"


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_an_adapter_of_zeros_is_none(opened, tmp_path, family):
    model = opened(family)
    lora = tmp_path / "zeros.safetensors"
    save_file(peft({name: (down, torch.zeros_like(up)) for name, (down, up) in layers(model).items()}), lora)
    settings = Settings(solver="euler", steps=STEPS, adapter=str(lora), batch_size=2)
    noise = torch.randn(3, *LATENTS, generator=torch.Generator().manual_seed(1))
    drawn = [by_us(model, settings, file, noise, [].__getitem__) for file in (lora, None)]
    assert torch.equal(*drawn)
