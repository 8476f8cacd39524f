"""Directories of Stable Diffusion 3 and FLUX that do not fit together, or that edit images, are refused by name."""

import json
import re
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel

from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.improvement import check_reference_model
from seppo_fast.models.labels import OF_REFERENCE


@pytest.fixture
def own(sd3_folder, flux_folder, tmp_path):
    """`own(name)`: a copy to damage."""
    return lambda name, place="own": shutil.copytree({"sd3": sd3_folder, "flux": flux_folder}[name], tmp_path / place / name)


def edit(file, without=(), **changes):
    found = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in found.items() if key not in without}))


@pytest.mark.parametrize(("name", "part", "changes", "message"), [
    ("sd3", "transformer", {"in_channels": 16}, "in_channels is 16, but the VAE makes it 4"),
    ("sd3", "transformer", {"without": ["in_channels"]}, "in_channels is 16, but the VAE makes it 4"),  # its class's own value
    ("sd3", "transformer", {"out_channels": 8}, "out_channels is 8, but the VAE makes it 4"),
    ("sd3", "transformer", {"joint_attention_dim": 128}, "joint_attention_dim is 128, but text_encoder_3 makes it 64"),
    ("sd3", "text_encoder", {"without": ["projection_dim"]}, "pooled_projection_dim is 56, but the sum .* makes it 552"),
    ("sd3", "text_encoder_3", {"without": ["d_model"]}, "joint_attention_dim is 64, but text_encoder_3 makes it 512"),
    ("flux", "transformer", {"in_channels": 96}, "in_channels is 96, but the VAE, .* makes it 16.*edits or completes"),  # Fill
    ("flux", "transformer", {"in_channels": 32, "out_channels": 16}, "in_channels is 32, but .* makes it 16"),  # Depth, Canny
    ("flux", "transformer", {"patch_size": 2}, "patch_size is 2, but packing makes it 1"),
    ("flux", "transformer", {"without": ["joint_attention_dim"]}, "joint_attention_dim is 4096, but text_encoder_2 makes it 32"),
    ("flux", "text_encoder", {"without": ["hidden_size"]}, "pooled_projection_dim is 16, but text_encoder makes it 512"),
    ("flux", "vae", {"shift_factor": None}, "it has no shift_factor, which FluxPipeline adds"),
    ("sd3", "vae", {"without": ["shift_factor"]}, "it has no shift_factor, which StableDiffusion3Pipeline adds"),
    ("sd3", "vae", {"latents_mean": [0.0] * 4}, "latents_mean is set, which this family's pipelines ignore"),
    ("flux", "vae", {"latent_channels": 16}, "in_channels is 16, but the VAE, .* makes it 64"),
])
def test_parts_that_do_not_fit(name, part, changes, message, own):
    folder = own(name)
    edit(folder / part / "config.json", **changes)
    with pytest.raises(UserError, match=f"{re.escape(str(folder))}/.*/config.json: {message}"):
        open_model(str(folder))


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("flux", {"_class_name": "FluxFillPipeline"}, "_class_name is 'FluxFillPipeline', which is given .*; what can be"
     " trained is .*FluxPipeline"),
    ("flux", {"_class_name": "FluxKontextPipeline"}, "_class_name is 'FluxKontextPipeline'"),
    ("sd3", {"_class_name": "StableDiffusion3Img2ImgPipeline"}, "_class_name is 'StableDiffusion3Img2ImgPipeline'"),
    ("flux", {"text_encoder_2": [None, None]}, "text_encoder_2 is .*, where T5EncoderModel is needed"),
    ("sd3", {"text_encoder": [None, None]}, "text_encoder is .*, where CLIPTextModelWithProjection is needed"),
    ("sd3", {"tokenizer_3": [None, None]}, "text_encoder_3 is .* and tokenizer_3 is .*: a model has both, or neither"),
    ("sd3", {"text_encoder_3": [None, None]}, "text_encoder_3 is .* and tokenizer_3 is .*: a model has both, or neither"),
    ("sd3", {"transformer": ["diffusers", "FluxTransformer2DModel"]}, "transformer is .*, where SD3Transformer2DModel is needed"),
])
def test_pipelines_of_another_kind(name, changes, message, own):
    folder = own(name)
    edit(folder / "model_index.json", **changes)
    with pytest.raises(UserError, match=f"{re.escape(str(folder))}/model_index.json: {message}"):
        open_model(str(folder))


@pytest.mark.parametrize(("name", "part", "message"), [
    ("sd3", "text_encoder_3", "text_encoder_3 is missing, though model_index.json lists it"),
    ("flux", "tokenizer_2", "tokenizer_2 is missing, though model_index.json lists it"),
    ("flux", "text_encoder_2/model.safetensors", "text_encoder_2 holds no weights"),
    ("sd3", "transformer/diffusion_pytorch_model.safetensors", "transformer holds no weights"),
    ("sd3", "tokenizer_3/tokenizer.json", "tokenizer_3/vocab.json is missing"),
])
def test_a_half_downloaded_model(name, part, message, own):
    folder = own(name)
    place = folder / part
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    with pytest.raises(UserError, match=message):
        open_model(str(folder))


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_text_encoders_that_see_prompts_of_different_lengths(part, own):
    folder = own("sd3")
    edit(folder / part / "tokenizer_config.json", model_max_length=40)
    with pytest.raises(UserError, match="the text encoders see prompts of different lengths"):
        open_model(str(folder))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_tokenizer_saved_without_its_length(name, own):
    folder = own(name)
    given = open_model(str(folder)).load_text("cpu")(["a red cat"])
    for file in folder.glob("tokenizer*/tokenizer_config.json"):
        edit(file, without=["model_max_length"])
    found = open_model(str(folder)).load_text("cpu")(["a red cat"])
    assert all(torch.equal(found[key], value) for key, value in given.items())


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_neither_motion_adapters_nor_images(name, own, adapter_folder):
    folder = own(name)
    with pytest.raises(UserError, match="motion adapters go with Stable Diffusion 1.x"):
        open_model(str(folder), motion_adapter=str(adapter_folder))
    with pytest.raises(UserError, match="is made of Stable Diffusion or SDXL, and not of a"):
        open_model(str(folder), image_condition=True)


@pytest.mark.parametrize(("file", "changes", "message"), [
    ("vae/config.json", {"shift_factor": 0.5}, "its VAE's shift_factor is 0.5 and not 0.0609"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "its num_train_timesteps is 500 and not 1000"),
    ("transformer/config.json", {"pos_embed_max_size": 12}, "its network is another: 1 weights .*, the first pos_embed.pos_embed"),
    ("transformer/config.json", {"sample_size": 4}, "its image size .the transformer's sample_size. is 4 and not 8"),
    ("scheduler/scheduler_config.json", {"shift": 1.0}, None),  # which times are trained, not what a time is
])
def test_another_model_as_the_reference(file, changes, message, own, sd3_folder):
    folder = own("sd3")
    if "pos_embed_max_size" in changes:
        (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        SD3Transformer2DModel.from_config(json.loads((folder / file).read_text()) | changes).save_pretrained(folder / "transformer")
    else:
        edit(folder / file, **changes)
    model, policy = open_model(str(folder), labels=OF_REFERENCE), open_model(str(sd3_folder))
    if message is None:
        check_reference_model(model, policy)
        return
    with pytest.raises(UserError, match=f"reference_model.path: {re.escape(str(folder))} does not fit .*: {message}"):
        check_reference_model(model, policy)


def test_a_reference_of_another_kind(sd3_folder, flux_folder, sd_folder):
    policy = open_model(str(sd3_folder))
    for other, kind in ((flux_folder, "flux"), (sd_folder, "sd")):
        with pytest.raises(UserError, match=f"its kind is '{kind}' and not 'sd3'; .*its network is another"):
            check_reference_model(open_model(str(other), labels=OF_REFERENCE), policy)
