"""The files of Qwen-Image's directories: as they are published, and those that are refused by name."""

import json
import shutil

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from tiny_qwen import TEMPLATE, qwen_tokenizer, qwen_vae, tiny_qwen

from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.trial import run_denoiser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_qwen(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture
def own(folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "qwen")


def edit(file, without=(), **changes):
    found = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in found.items() if key not in without}))


@torch.no_grad()
def test_the_published_form_of_the_text_encoder(folder, own):
    """Its tokenizer is words and merges with the special tokens beside them, its configuration has the text's values at the top."""
    tokens = json.loads((own / "tokenizer" / "tokenizer.json").read_text())
    special = {item["content"]: item["id"] for item in tokens["added_tokens"]}
    words = {word: number for word, number in tokens["model"]["vocab"].items() if word not in special}
    (own / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    (own / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in tokens["model"]["merges"]))
    (own / "tokenizer" / "tokenizer.json").unlink()
    (own / "tokenizer" / "added_tokens.json").write_text(json.dumps(special))
    edit(own / "tokenizer" / "tokenizer_config.json", added_tokens_decoder={
        str(item["id"]): {key: item[key] for key in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
        for item in tokens["added_tokens"]})
    file = own / "text_encoder" / "config.json"
    text = json.loads(file.read_text())["text_config"]
    scaling = text.pop("rope_parameters")
    edit(file, without=["text_config"], **text | {"model_type": "qwen2_5_vl", "rope_theta": scaling.pop("rope_theta"),
                                                  "rope_scaling": scaling})
    prompts = ["a red cat", "", "the sky, <|im_end|> 12"]
    got, wanted = (open_model(str(place)).load_text("cpu")(prompts) for place in (own, folder))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


CHANGES = {
    "an edit pipeline": ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "EditPipeline', which is given a picture"),
    "its successor": ("model_index.json", {"_class_name": "QwenImageEditPlusPipeline"}, "'QwenImageEditPlusPipeline'"),
    "a layered pipeline": ("model_index.json", {"_class_name": "QwenImageLayeredPipeline"}, "'QwenImageLayeredPipeline'"),
    "a ControlNet": ("model_index.json", {"_class_name": "QwenImageControlNetPipeline"}, "'QwenImageControlNetPipeline'"),
    "another transformer": ("model_index.json", {"transformer": ["diffusers", "FluxTransformer2DModel"]}, "where QwenImageTrans"),
    "no tokenizer": ("model_index.json", {"tokenizer": [None, None]}, "tokenizer is .*, where Qwen2Tokenizer"),
    "guidance as an input": ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds is set, as in a distilled"),
    "an edit transformer": ("transformer/config.json", {"zero_cond_t": True}, "zero_cond_t is set, as in a Qwen-Image-Edit model"),
    "a layered transformer": ("transformer/config.json", {"use_additional_t_cond": True}, "as in a Qwen-Image-Layered model"),
    "layers' places": ("transformer/config.json", {"use_layer3d_rope": True}, "as in a Qwen-Image-Layered model"),
    "more channels": ("transformer/config.json", {"in_channels": 32}, "in_channels is 32, but the VAE, .* makes it 16"),
    "other output": ("transformer/config.json", {"out_channels": 8}, "out_channels is 8, but the VAE makes it 4"),
    "other patches": ("transformer/config.json", {"patch_size": 1}, "patch_size is 1, but packing makes it 2"),
    "another text encoder": ("transformer/config.json", {"joint_attention_dim": 3584}, "but text_encoder makes it 32"),
    "odd axes": ("transformer/config.json", {"axes_dims_rope": [5, 5, 6]}, "the network that it describes does not work"),
    "a text": ("transformer/config.json", {"num_layers": "2"}, "num_layers is '2', where a whole number"),
    "a nested text": ("text_encoder/config.json", {"text_config": {"hidden_size": "32"}}, "hidden_size is '32', where a whole"),
    "no text encoder": ("text_encoder/config.json", {"text_config": "none"}, "cannot load .*text_encoder: .*'text_config'"),
    "levels": ("vae/config.json", {"temperal_downsample": [False, True]}, "temperal_downsample has 2 values, and dim_mult"),
    "alpha": ("vae/config.json", {"input_channels": 4}, "input_channels is 4, .* Qwen-Image-Layered"),
    "a mean": ("vae/config.json", {"latents_mean": [0.0] * 3}, "latents_mean and latents_std must be 4 numbers"),
    "no deviation": ("vae/config.json", {"latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std"),
    "channels": ("vae/config.json", {"z_dim": 16}, "latents_mean and latents_std must be 16 numbers"),
    "no flow": ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "shift_terminal|follows no flow"),
    "a terminal of one": ("scheduler/scheduler_config.json", {"shift_terminal": 1.0}, "shift_terminal is 1"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_refused_directories(case, own):
    name, changes, message = CHANGES[case]
    edit(own / name, **changes)
    if case == "no flow":
        edit(own / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(UserError, match=message) as caught:
        open_model(str(own))
    assert str(own) in str(caught.value)


def test_axes_of_another_head(own):
    edit(own / "transformer" / "config.json", axes_dims_rope=[4, 6, 8])
    with pytest.raises(UserError, match="transformer/config.json: the network that it describes does not work"):
        run_denoiser(open_model(str(own)))


@pytest.mark.parametrize(("tokens", "message"), [
    (lambda: qwen_tokenizer(TEMPLATE[:-1]), "makes 43 tokens of the words that QwenImagePipeline puts before a prompt, which"),
    (lambda: qwen_tokenizer(most=36), "model_max_length is 36, of which the pipeline's words before a prompt take 34"),
    (lambda: qwen_tokenizer((*TEMPLATE, *map(chr, range(0x61, 0x61 + 26)), "another", "word")), "Tokenizer and text encoder"),
], ids=["words in pieces", "no room", "more words"])
def test_tokenizers_of_other_models(tokens, message, own):
    shutil.rmtree(own / "tokenizer")
    tokens().save_pretrained(own / "tokenizer")
    with pytest.raises(UserError, match=message):
        open_model(str(own))


@pytest.mark.parametrize(("part", "message"), [
    ("text_encoder/model.safetensors", "text_encoder holds no weights"),
    ("vae/diffusion_pytorch_model.safetensors", "vae holds no weights"),
    ("transformer", "transformer is missing, though model_index.json lists it"),
    ("tokenizer/tokenizer.json", "tokenizer/vocab.json is missing"),
])
def test_a_half_downloaded_model(part, message, own):
    place = own / part
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    with pytest.raises(UserError, match=message):
        open_model(str(own))


def test_a_missing_shard_is_named(folder, own):
    (own / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    QwenImageTransformer2DModel.from_pretrained(folder / "transformer").save_pretrained(own / "transformer", max_shard_size="100KB")
    whole, wanted = open_model(str(own)).load_denoiser(torch.float32), open_model(str(folder)).load_denoiser(torch.float32)
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in whole.state_dict().items())
    last = max((own / "transformer").glob("*-of-*"))
    last.unlink()
    with pytest.raises(UserError, match=f"shards, of which 1 are missing: {last.name}"):
        open_model(str(own))


def test_a_vae_of_other_weights(own):
    qwen_vae(base_dim=16).save_pretrained(own / "vae")
    edit(own / "vae" / "config.json", base_dim=8)
    with pytest.raises(UserError, match="has the shape .* damaged, or another model's"):
        open_model(str(own))


def test_images_for_which_there_are_no_places(folder):
    model = open_model(str(folder))
    most = 2 * (4096 - 24) * 4
    model.check_side(most)
    with pytest.raises(UserError, match=f"images of {most + 4} pixels are larger than its transformer can place: at most {most}"):
        model.check_side(most + 4)


@torch.no_grad()
def test_the_last_places_are_the_transformer_s(folder):
    """One row of as many tokens as fit, and of two more."""
    model = open_model(str(folder))
    embed = model.load_denoiser(torch.float32).pos_embed
    for width, tokens in ((2 * (4096 - 24), 24), (2 * (4096 - 24) + 2, 23)):
        image, text = embed([[(1, 1, width)]], max_txt_seq_len=24, device=torch.device("cpu"))
        assert len(image) == width and len(text) == tokens
