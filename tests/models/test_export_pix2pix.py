"""A trained improvement model is an InstructPix2Pix directory that plain diffusers loads, from full weights and from a LoRA."""

import hashlib
import inspect
import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline
from edits import call, images
from safetensors.torch import load_file

from seppo_fast.config import Lora
from seppo_fast.models import open_improvement_model, open_model
from seppo_fast.models.export import save_pipeline
from seppo_fast.models.lora import choose_trained, trainable_weights

pytestmark = pytest.mark.slow

PIPELINES = {"sd": StableDiffusionInstructPix2PixPipeline, "sdxl": StableDiffusionXLInstructPix2PixPipeline}
LORA = Lora(rank=3, alpha=5.0, dropout=0.2, targets=["to_q", "to_k", "to_v", "to_out.0", "conv1"])


def trained(model, lora, dtype=torch.float32, size=0.05):
    """A UNet whose trained weights have moved, in evaluation mode."""
    unet = model.load_denoiser(dtype)
    choose_trained(unet, lora, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trainable_weights(unet).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(dtype))
    return unet.eval()


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_plain_diffusers_loads_it_and_gets_our_output(name, lora, request, tmp_path):
    source = request.getfixturevalue(f"{name}_folder")
    model = open_model(str(source), image_condition=True)
    unet, final = trained(model, lora), tmp_path / "final"
    save_pipeline(model, trainable_weights(unet), final, lora, "# A card\n")
    ours = call(model, unet, images())
    assert not torch.equal(call(model, unet, 0 * images()), ours)

    pipeline = DiffusionPipeline.from_pretrained(final)
    assert type(pipeline) is PIPELINES[name] and pipeline.unet.config.in_channels == 8
    index = {key for key in json.loads((final / "model_index.json").read_text()) if not key.startswith("_")}
    assert index <= set(inspect.signature(PIPELINES[name]).parameters)  # diffusers warns of others
    theirs = call(model, pipeline.unet, images())
    assert torch.equal(theirs, ours) if lora is None else torch.allclose(theirs, ours, atol=1e-5, rtol=1e-4)
    pipeline.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    improved = pipeline("a cat", image=picture, num_inference_steps=2, guidance_scale=3.5, image_guidance_scale=3.0,
                        output_type="np").images
    assert improved.shape == (1, 16, 16, 3)

    again = open_improvement_model(str(final))  # serves stage two, and can be trained further
    assert torch.equal(call(again, again.load_denoiser(torch.float32), images()), theirs)
    assert open_model(str(final), image_condition=True).image_condition
    untouched = {key: value for key, value in digests(source).items() if not key.startswith(("unet", "model_index"))}
    assert untouched.items() <= digests(final).items()
    assert (final / "README.md").read_text() == "# A card\n" and str(tmp_path) not in (final / "unet/config.json").read_text()
    assert str(source) not in (final / "unet/config.json").read_text()


def test_full_weights_stay_as_they_are(sd_folder, tmp_path):
    model = open_model(str(sd_folder), image_condition=True)
    unet = trained(model, None, torch.bfloat16)
    save_pipeline(model, trainable_weights(unet), tmp_path / "final", None, "card")
    stored = load_file(tmp_path / "final/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(stored[key], value) for key, value in unet.state_dict().items())


def test_a_lora_in_half_precision_is_merged_in_full(sd_folder, tmp_path):
    """What it adds is below bf16's resolution of the weights that it is added to."""
    model = open_model(str(sd_folder), image_condition=True)
    unet = trained(model, LORA, torch.bfloat16, size=1e-3)
    save_pipeline(model, trainable_weights(unet), tmp_path / "final", LORA, "card")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer, base = unet.get_submodule(name), model.load_denoiser(torch.float32).get_parameter(f"{name}.weight")
    delta = (layer.lora_B.default.weight.float() @ layer.lora_A.default.weight.float()) * 5 / 3
    stored = load_file(tmp_path / "final/unet/diffusion_pytorch_model.safetensors")
    assert torch.allclose(stored[f"{name}.weight"], base + delta, atol=1e-7)
    assert delta.abs().max() > 1e-6 and ((base + delta).bfloat16() == base.bfloat16()).float().mean() > 0.5
    assert all(torch.equal(stored[key], weight.float()) for key, weight in trainable_weights(unet).items() if ".lora_" not in key)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_bytes_do_not_depend_on_the_place_or_the_order(sd_folder, tmp_path, lora):
    model = open_model(str(sd_folder), image_condition=True)
    weights = trainable_weights(trained(model, lora))
    save_pipeline(model, weights, tmp_path / "a", lora, "card")
    save_pipeline(model, dict(reversed(weights.items())), tmp_path / "elsewhere" / "b", lora, "card")
    assert digests(tmp_path / "a") == digests(tmp_path / "elsewhere" / "b")


def test_a_weight_that_is_missing(sd_folder, tmp_path):
    model = open_model(str(sd_folder), image_condition=True)
    weights = trainable_weights(trained(model, LORA))
    weights.pop("conv_in.weight")
    with pytest.raises(ValueError, match="conv_in.weight"):
        save_pipeline(model, weights, tmp_path / "final", LORA, "card")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_directory_that_was_one_already(pix2pix_folder, tmp_path, lora):
    model = open_model(str(pix2pix_folder), image_condition=True)
    unet = trained(model, lora)
    save_pipeline(model, trainable_weights(unet), tmp_path / "final", lora, "card")
    assert (tmp_path / "final/model_index.json").read_bytes() == (pix2pix_folder / "model_index.json").read_bytes()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(call(model, pipeline.unet, images()), call(model, unet, images()), atol=1e-5, rtol=1e-4)
