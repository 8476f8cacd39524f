"""What an improvement model and a policy must have in common is named where it differs."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from tiny import tiny_pix2pix, tiny_sd
from transformers import CLIPTextModel

from seppo_fast.errors import UserError
from seppo_fast.models import open_improvement_model, open_model
from seppo_fast.models.export import save_pipeline
from seppo_fast.models.improvement import check_improvement_model
from seppo_fast.models.labels import Labels
from seppo_fast.models.lora import trainable_weights

LABELS = Labels(path="seppo.improvement.path")


def check(folder, policy):
    check_improvement_model(open_improvement_model(str(folder), labels=LABELS), open_model(str(policy)))


def named(folder, policy, *fragments):
    """The message names the key, both models, and every one of these."""
    with pytest.raises(UserError) as caught:
        check(folder, policy)
    assert f"seppo.improvement.path: {folder} does not fit the policy's model {policy}: " in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)
    assert str(caught.value).count("; ") == len(fragments) - 1, str(caught.value)


@pytest.fixture
def own(pix2pix_folder, tmp_path):
    return shutil.copytree(pix2pix_folder, tmp_path / "pix2pix")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_what_was_trained_from_the_policy_s_base_fits(name, request, tmp_path, monkeypatch):
    source = request.getfixturevalue(f"{name}_folder")
    model = open_model(str(source), image_condition=True)
    save_pipeline(model, trainable_weights(model.load_denoiser(torch.float32)), tmp_path / "final", None, "card")
    loaded = []
    for part in ("load_vae", "load_text"):  # equal files need not be loaded
        monkeypatch.setattr(type(model), part, lambda *given, part=part: loaded.append(part))
    check(tmp_path / "final", source)
    assert not loaded


def test_another_precision_of_the_same_weights_fits(own, sd_folder):
    AutoencoderKL.from_pretrained(own / "vae").half().save_pretrained(own / "vae")
    CLIPTextModel.from_pretrained(own / "text_encoder").bfloat16().save_pretrained(own / "text_encoder")
    check(own, sd_folder)


@pytest.mark.parametrize("component, words", [
    ("vae", "its VAE makes other latents of a picture"),
    ("text_encoder", "its text encoder or tokenizer makes other embeddings of a prompt"),
])
def test_other_weights(own, sd_folder, tmp_path, component, words):
    shutil.rmtree(own / component)
    shutil.copytree(tiny_sd(tmp_path / "other", seed=1) / component, own / component)
    named(own, sd_folder, words)


def test_another_activation_with_the_same_weights(own, sd_folder):
    edit(own / "text_encoder/config.json", hidden_act="gelu")
    edit(own / "text_encoder/config.json", num_attention_heads=2)
    named(own, sd_folder, "its text encoder or tokenizer makes other embeddings")


@pytest.mark.parametrize("file, change, words", [
    ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "its noise schedule (scheduler_config.json) has other noise levels"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "its noise schedule"),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"},
     "its prediction_type is 'v_prediction' and not 'epsilon'"),
    ("unet/config.json", {"sample_size": 16}, "its image size (the UNet's sample_size) is 16 and not 8"),
    ("vae/config.json", {"scaling_factor": 0.13}, "its VAE's scaling_factor is 0.13 and not 0.18215"),
])
def test_other_configurations(own, sd_folder, file, change, words):
    edit(own / file, **change)
    named(own, sd_folder, words)


def test_all_is_said_at_once(own, sd_folder, tmp_path):
    edit(own / "scheduler/scheduler_config.json", beta_end=0.02)
    other = tiny_sd(tmp_path / "other", seed=1)
    for component in ("vae", "text_encoder"):
        shutil.rmtree(own / component)
        shutil.copytree(other / component, own / component)
    named(own, sd_folder, "noise schedule", "VAE", "text encoder")


def test_configuration_and_weights_at_once(own, sd_folder, tmp_path):
    edit(own / "unet/config.json", sample_size=16)
    shutil.rmtree(own / "vae")
    shutil.copytree(tiny_sd(tmp_path / "other", seed=1) / "vae", own / "vae")
    named(own, sd_folder, "its image size", "its VAE makes other latents")


def test_another_family(xl_pix2pix_folder, sd_folder, animatediff_folder, pix2pix_folder):
    with pytest.raises(UserError, match="its kind is 'sdxl' and not 'sd'.* its text width .* is 80 and not 32"):
        check(xl_pix2pix_folder, sd_folder)
    with pytest.raises(UserError, match="its kind is 'sd' and not 'animatediff'"):
        check(pix2pix_folder, animatediff_folder)


def test_what_an_empty_prompt_becomes(sdxl_folder, tmp_path):
    folder = tiny_pix2pix(tmp_path / "xl", "sdxl")
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    named(folder, sdxl_folder, "its force_zeros_for_empty_prompt is False and not True")
