"""A model with an image condition: it begins as its base, and InstructPix2Pix directories are opened as they are."""

import json
import shutil

import pytest
import torch
from edits import call, images
from tiny import LATENTS, tiny_pix2pix, tiny_sd

from seppo_fast.config import Lora
from seppo_fast.errors import UserError
from seppo_fast.models import open_improvement_model, open_model
from seppo_fast.models.lora import choose_trained, share_frozen, trainable_weights, trains_a_part
from seppo_fast.models.published import published_model
from seppo_fast.models.trial import run_denoiser

CLASSES = {"sd": "StableDiffusionInstructPix2PixPipeline", "sdxl": "StableDiffusionXLInstructPix2PixPipeline"}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_as_its_base_whatever_the_image(name, dtype, request):
    folder = str(request.getfixturevalue(f"{name}_folder"))
    base, model = open_model(folder), open_model(folder, image_condition=True)
    assert model.image_condition and not base.image_condition and type(model) is type(base)
    unet, old = model.load_denoiser(dtype), base.load_denoiser(dtype)
    assert unet.config.in_channels == unet.conv_in.in_channels == 8 and unet.conv_in.weight.shape[1] == 8
    assert unet.dtype == dtype and all(weight.requires_grad for weight in unet.parameters())
    want = call(base, old, dtype=dtype)
    for image in (images(), torch.zeros(2, *LATENTS)):
        assert torch.equal(call(model, unet, image, dtype), want)
    same = {key: value for key, value in unet.state_dict().items() if key != "conv_in.weight"}
    assert all(torch.equal(value, old.state_dict()[key]) for key, value in same.items())  # the bias, too
    with torch.device("meta"):
        empty = model.empty_denoiser()
    assert {key: value.shape for key, value in empty.state_dict().items()} == \
        {key: value.shape for key, value in unet.state_dict().items()}
    run_denoiser(model)


@pytest.mark.parametrize("name, folder", [("sd", "pix2pix_folder"), ("sdxl", "xl_pix2pix_folder")])
def test_the_network_gets_the_image_behind_the_latents_unscaled(name, folder, request):
    model = open_improvement_model(str(request.getfixturevalue(folder)))
    assert model.image_condition and model.name == name
    unet, image = model.load_denoiser(torch.float32), images()
    g = torch.Generator().manual_seed(0)
    text = torch.randn(2, 77, 32 if name == "sd" else 80, generator=g)
    added = {}
    if name == "sdxl":
        added = {"text_embeds": torch.randn(2, 40, generator=g), "time_ids": torch.tensor([[16., 16, 0, 0, 16, 16]] * 2)}
    latents = torch.randn(2, *LATENTS, generator=g)
    with torch.no_grad():
        want = unet(torch.cat([latents, image], dim=1), torch.tensor([5, 800]), text, added_cond_kwargs=added).sample
    assert torch.equal(call(model, unet, image), want)
    assert not torch.equal(call(model, unet, 0 * image), want)


def test_cosxl_scales_the_image(xl_pix2pix_folder, tmp_path):
    folder = shutil.copytree(xl_pix2pix_folder, tmp_path / "cosxl")
    edit(folder / "model_index.json", is_cosxl_edit=True)
    plain, model = open_improvement_model(str(xl_pix2pix_folder)), open_improvement_model(str(folder))
    unet = model.load_denoiser(torch.float32)
    assert torch.equal(call(model, unet, images()), call(plain, unet, images() * model.latent_scale.factor))
    edit(folder / "model_index.json", is_cosxl_edit="no")
    with pytest.raises(UserError, match="is_cosxl_edit is 'no'"):
        open_improvement_model(str(folder))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_training_goes_on_from_such_a_directory(name, request):
    folder = request.getfixturevalue("pix2pix_folder" if name == "sd" else "xl_pix2pix_folder")
    model = open_model(str(folder), image_condition=True)
    unet = model.load_denoiser(torch.float32)
    assert unet.conv_in.weight.shape[1] == 8 and unet.conv_in.weight[:, 4:].abs().sum() > 0
    assert model.directory.index["_class_name"] == CLASSES[name]


def test_kinds_that_are_asked_for_in_the_wrong_place(sd_folder, pix2pix_folder, animatediff_folder, adapter_folder):
    with pytest.raises(UserError, match="seppo.model.path: .* is a StableDiffusionInstructPix2PixPipeline: it changes a given"):
        open_model(str(pix2pix_folder))
    with pytest.raises(UserError, match="is a StableDiffusionPipeline, which is given no image that it could improve"):
        open_improvement_model(str(sd_folder))
    for folder, adapter in ((animatediff_folder, None), (sd_folder, str(adapter_folder))):
        with pytest.raises(UserError, match="an improvement model is made of an image model"):
            open_model(str(folder), motion_adapter=adapter, image_condition=True)
    with pytest.raises(UserError, match="motion adapters go with Stable Diffusion 1.x"):
        open_model(str(pix2pix_folder), motion_adapter=str(adapter_folder), image_condition=True)


@pytest.mark.parametrize("make, channels, words", [
    (tiny_sd, 9, "in_channels is 9 \\(inpainting\\)"), (tiny_sd, 8, "in_channels is 8 \\(image editing"),
    (tiny_pix2pix, 9, "in_channels is 9 \\(inpainting\\)"),
    (tiny_pix2pix, 4, "in_channels is 4, but the VAE's latents have 4 channels, so that 8 are needed"),
])
def test_networks_with_other_input_channels(make, channels, words, tmp_path):
    folder = str(make(tmp_path / "model", in_channels=channels))
    with pytest.raises(UserError, match=words):
        open_model(folder, image_condition=True)
    if make is tiny_pix2pix:
        with pytest.raises(UserError, match=words):
            open_improvement_model(folder)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_lora_trains_the_first_convolution_in_full(name, request):
    model = open_model(str(request.getfixturevalue(f"{name}_folder")), image_condition=True)
    policy, reference = model.load_denoiser(torch.float32), model.load_denoiser(torch.float32)
    for unet in (policy, reference):
        choose_trained(unet, Lora(rank=2), seed=1)
    trained = trainable_weights(policy)
    assert {"conv_in.weight", "conv_in.bias"} == {key for key in trained if ".lora_" not in key} and len(trained) > 4
    assert trains_a_part(policy)
    share_frozen(reference, policy)
    assert reference.conv_in.weight.data_ptr() != policy.conv_in.weight.data_ptr()
    assert reference.conv_out.weight.data_ptr() == policy.conv_out.weight.data_ptr()
    call(model, policy, images())
    output = model.denoise(policy, torch.randn(2, *LATENTS), torch.tensor([5, 800]), {
        "prompt_embeds": torch.randn(2, 77, 32 if name == "sd" else 80), "pooled": torch.randn(2, 40), "image_latents": images()})
    output.square().mean().backward()
    assert policy.conv_in.weight.grad[:, 4:].abs().sum() > 0


def test_a_text_to_image_model_trains_no_convolution_beside_its_lora(sd_folder):
    unet = open_model(str(sd_folder)).load_denoiser(torch.float32)
    choose_trained(unet, Lora(rank=2), seed=1)
    assert all(".lora_" in key for key in trainable_weights(unet))


def test_lora_on_the_first_convolution_is_refused(sd_folder):
    unet = open_model(str(sd_folder), image_condition=True).load_denoiser(torch.float32)
    with pytest.raises(UserError, match="seppo.model.lora.targets: the first convolution \\(conv_in\\) is trained in full"):
        choose_trained(unet, Lora(targets=["to_q", "conv_in"]), seed=1)


def test_published_models_can_be_planned_with_an_image():
    for path in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"):
        model, base = published_model(path, image_condition=True), published_model(path)
        assert model.image_condition and not base.image_condition
        with torch.device("meta"):
            assert model.empty_denoiser().conv_in.weight.shape[1] == 8 == 2 * base.empty_denoiser().conv_in.weight.shape[1]
