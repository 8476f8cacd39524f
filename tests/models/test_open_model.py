"""Directories that are not what they should be: each is refused with the name of the file at fault."""

import json
import re
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import LATENTS, tiny_sd
from transformers import CLIPTokenizer

from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.files import variants

UNET = "unet/diffusion_pytorch_model.safetensors"


def refused(folder, *fragments, **options):
    with pytest.raises(UserError) as caught:
        open_model(str(folder), **options)
    for fragment in fragments:
        assert fragment in str(caught.value), (fragment, str(caught.value))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_path_that_is_no_directory(tmp_path):
    refused(tmp_path / "absent", "absent", "does not exist")
    refused("not a model", "not a model", "hub id")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    refused(tmp_path / "model.ckpt", "model.ckpt", "from_single_file")
    refused(tmp_path, "model_index.json")


def test_a_component_is_not_a_pipeline(own_sd):
    refused(own_sd / "unet", "give its parent")


def test_other_pipelines(own_sd):
    edit(own_sd / "model_index.json", _class_name="FluxKontextPipeline")
    refused(own_sd, "model_index.json", "FluxKontextPipeline", "StableDiffusionPipeline", "FluxPipeline")


def test_other_component_class(own_sd):
    edit(own_sd / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    refused(own_sd, "vae", "AutoencoderTiny", "AutoencoderKL")
    edit(own_sd / "model_index.json", vae=[None, None])
    refused(own_sd, "vae", "None")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_component(own_sd, component):
    shutil.rmtree(own_sd / component)
    refused(own_sd, str(own_sd / component), "missing")


@pytest.mark.parametrize("name", ["unet/config.json", "vae/config.json", "text_encoder/config.json",
                                  "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "model_index.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"\xff\xfe\x00"])
def test_damaged_json(own_sd, name, content):
    (own_sd / name).write_bytes(content)
    refused(own_sd, str(own_sd / name))


@pytest.mark.parametrize("name", [UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 40, 2000, -1])
def test_truncated_weights(own_sd, name, keep):
    content = (own_sd / name).read_bytes()
    (own_sd / name).write_bytes(content[:keep])
    refused(own_sd, str(own_sd / name))


def test_weights_with_too_many_bytes_or_a_bad_header(own_sd):
    path = own_sd / UNET
    content = path.read_bytes()
    path.write_bytes(content + b"tail")
    refused(own_sd, str(path), str(len(content) + 4), str(len(content)))
    path.write_bytes(content[:8] + b"\x00" * (len(content) - 8))
    refused(own_sd, str(path), "header")


def test_git_lfs_pointer(own_sd):
    (own_sd / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused(own_sd, str(own_sd / UNET), "git lfs pull")


def test_no_weights_at_all(own_sd):
    (own_sd / UNET).unlink()
    refused(own_sd, str(own_sd / "unet"), "no weights")


def test_old_tokenizer_files(own_sd):
    folder = own_sd / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    before = open_model(str(own_sd)).load_text("cpu")(["a red cat"])
    (folder / "tokenizer.json").unlink()
    refused(own_sd, "vocab.json")
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    refused(own_sd, "merges.txt")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    after = open_model(str(own_sd)).load_text("cpu")(["a red cat"])
    assert torch.equal(before["prompt_embeds"], after["prompt_embeds"])


def test_shards(own_sd):
    model = open_model(str(own_sd))
    whole = model.load_denoiser(torch.float32)
    shutil.rmtree(own_sd / "unet")
    whole.save_pretrained(own_sd / "unet", max_shard_size="1MB")
    shards = sorted((own_sd / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    loaded = open_model(str(own_sd)).load_denoiser(torch.float32)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in loaded.state_dict().items())
    shards[1].write_bytes(shards[1].read_bytes()[:-3])
    refused(own_sd, str(shards[1]))
    shards[1].unlink()
    refused(own_sd, "index.json", shards[1].name, "missing")


def test_pickled_weights_are_a_fallback(own_sd):
    model = open_model(str(own_sd))
    unet = model.load_denoiser(torch.float32)
    unet.save_pretrained(own_sd / "unet", safe_serialization=False)
    assert open_model(str(own_sd)).directory.weights["unet"].safetensors
    (own_sd / UNET).unlink()
    model = open_model(str(own_sd))
    assert not model.directory.weights["unet"].safetensors
    assert torch.equal(model.load_denoiser(torch.float32).conv_in.weight, unet.conv_in.weight)
    path = own_sd / "unet/diffusion_pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-500])
    refused(own_sd, str(path), "truncated")


def test_variant(own_sd):
    refused(own_sd, "fp16", "diffusion_pytorch_model.safetensors", variant="fp16")
    halves = {name: (value / 2).half() for name, value in load_file(own_sd / UNET).items()}
    save_file(halves, own_sd / "unet/diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    model = open_model(str(own_sd), variant="fp16")
    assert torch.equal(model.load_denoiser(torch.float16).conv_in.weight, halves["conv_in.weight"])
    model.load_vae("cpu")  # has no such variant, and falls back
    plain = open_model(str(own_sd)).load_denoiser(torch.float32)
    assert not torch.equal(plain.conv_in.weight.half(), halves["conv_in.weight"])


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_of_a_variant_alone(own_sd, component, suffix):
    file = next((own_sd / component).glob("*.safetensors"))
    stem = "pytorch_model" if (suffix, component) == ("bin", "text_encoder") else file.stem
    file.rename(file.with_name(f"{stem}.fp16.{suffix}"))
    refused(own_sd, str(own_sd / component), "weights of the variant 'fp16' alone", "set seppo.model.variant to 'fp16'")
    if suffix == "safetensors":
        own = load_file(file.with_name(f"{stem}.fp16.safetensors"))
        save_file(own, file.with_name(f"{stem}.ema.safetensors"), metadata={"format": "pt"})
        refused(own_sd, "variants 'ema', 'fp16' alone", "'ema' or 'fp16'")
        if component == "unet":
            assert open_model(str(own_sd), variant="fp16").directory.weights["unet"].variant == "fp16"


@pytest.mark.parametrize("names, library, expected", [
    (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.bin"], "diffusers", ["fp16", "non_ema"]),
    (["diffusion_pytorch_model.safetensors.index.fp16.json"], "diffusers", ["fp16"]),
    (["diffusion_pytorch_model-00001-of-00002.fp16.safetensors"], "diffusers", ["fp16"]),
    (["model.fp16-00001-of-00002.safetensors"], "transformers", ["fp16"]),
    (["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "model.onnx"],
     "transformers", []),
])
def test_names_of_variants(names, library, expected):
    assert variants(names, library) == expected


@pytest.mark.parametrize("folder, which", [("own_sd", ""), ("own_sdxl", ""), ("own_sdxl", "_2")])
def test_a_tokenizer_with_more_tokens_than_the_encoder(request, folder, which):
    path = request.getfixturevalue(folder)
    tokenizer = CLIPTokenizer.from_pretrained(path / f"tokenizer{which}")
    tokenizer.add_tokens(["<new-style>"])
    tokenizer.save_pretrained(path / f"tokenizer{which}")
    number = tokenizer.convert_tokens_to_ids("<new-style>")
    refused(path, str(path / f"tokenizer{which}"), f"'<new-style>' has the number {number}", f"embeddings for {number} tokens",
            "different models")


def test_a_tokenizer_without_padding(own_sd):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := own_sd / "tokenizer" / name).exists():
            file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "pad_token"}
                                       | {"pad_token": None}))
    if CLIPTokenizer.from_pretrained(own_sd / "tokenizer").pad_token_id is None:
        refused(own_sd, "no pad_token")
    else:
        open_model(str(own_sd))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_tensors(own_sd, component):
    path = next((own_sd / component).glob("*.safetensors"))
    tensors = load_file(path)
    dropped = sorted(tensors)[-1]
    save_file({name: value for name, value in tensors.items() if name != dropped}, path, metadata={"format": "pt"})
    model = open_model(str(own_sd))
    load = {"unet": lambda: model.load_denoiser(torch.float32), "vae": lambda: model.load_vae("cpu"),
            "text_encoder": lambda: model.load_text("cpu")}[component]
    with pytest.raises(UserError, match=re.escape(str(path))):
        load()


def test_weights_of_another_shape(own_sd):
    edit(own_sd / "unet/config.json", block_out_channels=[32, 96])
    with pytest.raises(UserError, match="cannot load .*unet"):
        open_model(str(own_sd)).load_denoiser(torch.float32)


def test_vae_with_the_old_attention_names(own_sd):
    """As the files of SD-1.5's VAE are: query, key, value, proj_attn."""
    before = open_model(str(own_sd)).load_vae("cpu")
    path = own_sd / "vae/diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, value in load_file(path).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = value
    assert any("proj_attn" in name for name in renamed)
    save_file(renamed, path, metadata={"format": "pt"})
    after = open_model(str(own_sd)).load_vae("cpu")
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())


@pytest.mark.parametrize("prediction", ["sample", "velocity", None])
def test_prediction_type(own_sd, prediction):
    edit(own_sd / "scheduler/scheduler_config.json", prediction_type=prediction)
    refused(own_sd, "scheduler_config.json", "prediction_type", repr(prediction), "epsilon")


def test_prediction_type_left_out_is_epsilon(own_sd):
    path = own_sd / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    del config["prediction_type"]
    path.write_text(json.dumps(config))
    assert open_model(str(own_sd)).prediction_type == "epsilon"


def test_flow_matching_has_no_betas(own_sd):
    path = own_sd / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}))
    refused(own_sd, str(path), "FlowMatchEulerDiscreteScheduler", "beta")


def test_inpainting_unet(tmp_path):
    folder = tiny_sd(tmp_path / "inpainting", in_channels=9)
    assert StableDiffusionPipeline.from_pretrained(folder).unet.config.in_channels == 9
    refused(folder, "unet/config.json", "in_channels", "9", "inpainting", str(LATENTS[0]))


@pytest.mark.parametrize("overrides, key", [({"out_channels": 8}, "out_channels"),
                                            ({"cross_attention_dim": 24}, "cross_attention_dim"),
                                            ({"time_cond_proj_dim": 32}, "time_cond_proj_dim")])
def test_unet_that_does_not_fit(tmp_path, overrides, key):
    refused(tiny_sd(tmp_path / "other", **overrides), "unet/config.json", key)


def test_vae_statistics_are_refused(own_sd):
    edit(own_sd / "vae/config.json", latents_mean=[0.0] * 4)
    refused(own_sd, "vae/config.json", "latents_mean")


def test_sdxl_that_does_not_fit(own_sdxl):
    edit(own_sdxl / "text_encoder_2/config.json", projection_dim=48)
    refused(own_sdxl, "projection_class_embeddings_input_dim", "88", "96")
    edit(own_sdxl / "text_encoder_2/config.json", projection_dim=40, hidden_size=32)
    refused(own_sdxl, "cross_attention_dim", "80", "64")


def test_sdxl_refiner(own_sdxl):
    edit(own_sdxl / "model_index.json", text_encoder=[None, None])
    refused(own_sdxl, "text_encoder", "CLIPTextModel")
