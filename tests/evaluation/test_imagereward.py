"""ImageReward from a file like the public one, recomputed by a small BLIP written as its authors wrote it."""

import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer

from seppo_fast.errors import UserError
from seppo_fast.evaluation.scores.imagereward import IMAGEREWARD, load_reward

CPU = torch.device("cpu")
SIZE = 48
WORDS = ("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"!&',.-", *"abcdefg",
         *(f"##{letter}" for letter in "abcdefgs"), "cat", "dog", "the", "red", "sky", "photo", "of", "##graph", "cafe", "2")
ROWS = len(WORDS) + 2  # and BLIP's [DEC], [ENC]
PROMPTS = ("a cat", "A photograph of the RED sky!", "", "dogs, cats & the Café-deed 2", "the xylophone's dog [ENC] a [DEC]")
SIZES = ((48, 48), (51, 48), (48, 53), (111, 64), (20, 15))


class Attention(nn.Module):
    """Queries of `width`, keys and values of `other`; heads of 64."""

    def __init__(self, width: int, other: int):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(other, width), nn.Linear(other, width)

    def forward(self, x: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (layer(y).unflatten(-1, (-1, 64)).transpose(1, 2)
                   for layer, y in ((self.query, x), (self.key, other), (self.value, other)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Output(nn.Module):
    def __init__(self, inner: int, width: int):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, inner: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(inner) + x)


class TextLayer(nn.Module):
    def __init__(self, width: int, other: int):
        super().__init__()
        self.attention = nn.ModuleDict({"self": Attention(width, width), "output": Output(width, width)})
        self.crossattention = nn.ModuleDict({"self": Attention(width, other), "output": Output(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = Output(4 * width, width)

    def forward(self, x: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, x, mask), x)
        x = self.crossattention["output"](self.crossattention["self"](x, image), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class TextEncoder(nn.Module):
    """BLIP's med.py without a pooler, `mode="multimodal"`."""

    def __init__(self, rows: int, width: int, layers: int, other: int):
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(rows, width, padding_idx=0), "position_embeddings": nn.Embedding(512, width),
            "LayerNorm": nn.LayerNorm(width, eps=1e-12)})
        self.embeddings.register_buffer("position_ids", torch.arange(512)[None])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(TextLayer(width, other) for _ in range(layers))})

    def forward(self, ids: Tensor, attended: Tensor, image: Tensor) -> Tensor:
        e = self.embeddings
        x = e["LayerNorm"](e["word_embeddings"](ids) + e["position_embeddings"](e.position_ids[:, :ids.shape[1]]))
        mask = (1.0 - attended[:, None, None, :].float()) * -10000.0
        for layer in self.encoder["layer"]:
            x = layer(x, image, mask)
        return x


class Block(nn.Module):
    """timm's."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1))
        x = x + self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class VisualEncoder(nn.Module):
    def __init__(self, size: int, width: int, layers: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // 16) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 16, 16)})
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ImageReward(nn.Module):
    """The module tree of the authors, whose parameters and buffers have the public file's names and shapes."""

    def __init__(self, size: int, width: int, layers: int, rows: int, text_width: int, text_layers: int):
        super().__init__()
        self.blip = nn.ModuleDict({
            "visual_encoder": VisualEncoder(size, width, layers), "text_encoder": TextEncoder(rows, text_width, text_layers, width),
            "vision_proj": nn.Linear(width, 256), "text_proj": nn.Linear(text_width, 256)})
        self.mlp = nn.ModuleDict({"layers": nn.Sequential(
            nn.Linear(text_width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
            nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1))})

    def forward(self, pixels: Tensor, ids: Tensor, attended: Tensor) -> Tensor:
        hidden = self.blip["text_encoder"](ids, attended, self.blip["visual_encoder"](pixels))
        return (self.mlp["layers"](hidden[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


def tiny_reward() -> ImageReward:
    torch.manual_seed(3)
    model = ImageReward(SIZE, 128, 2, ROWS, 192, 2).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("mlp."):
                parameter.mul_(2)  # rewards that differ by about 1
            elif "LayerNorm" in name or "norm" in name:  # at their initial values they could be left out unnoticed
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif "embed" in name or "cls_token" in name:  # small, as BERT's: where LayerNorm's eps shows
                parameter.normal_(std=0.01)
            else:
                parameter.normal_(std=0.12)
    return model


def word_pieces(prompt: str) -> list[int]:
    """bert-base-uncased: lower case, no accents, punctuation apart, then the longest pieces that there are."""
    ids = []
    for word in re.findall(r"\[ENC\]|\[DEC\]|\w+|[^\w\s]", prompt):
        if word in ("[DEC]", "[ENC]"):
            ids.append(len(WORDS) + ("[DEC]", "[ENC]").index(word))
            continue
        rest, pieces = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if not unicodedata.combining(c)), []
        while rest:
            piece = ("##" if pieces else "") + rest
            while piece not in WORDS and piece.strip("#"):
                piece = piece[:-1]
            if not piece.strip("#"):
                pieces = ["[UNK]"]
                break
            pieces.append(piece)
            rest = rest[len(piece.removeprefix("##")):]
        ids += [WORDS.index(piece) for piece in pieces]
    return ids


def published_ids(prompts) -> tuple[Tensor, Tensor]:
    """`[CLS] pieces [SEP]`, 35 of them, and which are no padding."""
    cut = [[WORDS.index("[CLS]"), *word_pieces(prompt)[:33], WORDS.index("[SEP]")] for prompt in prompts]
    ids = torch.tensor([ids + [WORDS.index("[PAD]")] * (35 - len(ids)) for ids in cut])
    return ids, torch.tensor([[place < len(ids) for place in range(35)] for ids in cut])


def published_pixels(image: Image.Image) -> Tensor:
    """torchvision's Resize(bicubic), CenterCrop, convert("RGB"), ToTensor, Normalize, in the authors' order."""
    width, height = image.size
    size = (SIZE, int(SIZE * height / width)) if width <= height else (int(SIZE * width / height), SIZE)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = int(round((size[0] - SIZE) / 2.0)), int(round((size[1] - SIZE) / 2.0))
    levels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)).convert("RGB"), dtype=np.float32) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy((levels - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)


@torch.no_grad()
def published(model: ImageReward, images, prompts) -> Tensor:
    """One by one, as `ImageReward.score` does it."""
    return torch.cat([model(published_pixels(image)[None], *published_ids([prompt]))
                      for image, prompt in zip(images, prompts, strict=True)])


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.NEAREST)


PICTURES = [picture(size, seed) for seed, size in enumerate(SIZES)]


def save_words(folder: Path, words) -> Path:
    """The vocabulary in the form of bert-base-uncased's."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(tiny_reward().state_dict(), folder / "ImageReward.pt")
    return {"model": folder / "ImageReward.pt", "tokenizer": save_words(folder / "words", WORDS)}


@pytest.fixture(scope="module")
def scorer(parts):
    return IMAGEREWARD.load(parts, CPU)


def agree(scores: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_the_reward_is_that_of_the_authors_model(scorer):
    scores = scorer(PICTURES, PROMPTS)
    agree(scores, published(tiny_reward(), PICTURES, PROMPTS))
    assert scores.dtype == torch.float32 and scores.std() > 0.3


def test_both_the_picture_and_the_prompt_count(scorer):
    (same, other_picture, other_prompt) = scorer([PICTURES[0], PICTURES[1], PICTURES[0]], ["a cat", "a cat", "the red sky"])
    assert abs(same - other_picture) > 0.01 and abs(same - other_prompt) > 0.01


@pytest.mark.parametrize("form", ["vocab.txt alone", "tokenizer.json", "with BLIP's tokens"])
def test_the_tokenizer_may_have_any_of_its_forms(parts, tmp_path, form):
    words = save_words(tmp_path / "words", WORDS)
    tokenizer = BertTokenizer.from_pretrained(words)
    if form == "with BLIP's tokens":  # as in Salesforce's repositories of BLIP
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    (words / "tokenizer_config.json").unlink()
    if form != "vocab.txt alone":
        (words / "vocab.txt").unlink()
        tokenizer.save_pretrained(words)
    scores = IMAGEREWARD.load(parts | {"tokenizer": words}, CPU)(PICTURES, PROMPTS)
    agree(scores, published(tiny_reward(), PICTURES, PROMPTS))


def test_a_long_prompt_is_cut_after_33_pieces(scorer):
    prompts = ["a red cat " * 60, "a cat " * 16 + "dog", "a cat " * 16 + "dog sky", "a cat " * 16 + "the sky", "deed " * 30]
    scores = scorer(PICTURES[:1] * 5, prompts)
    agree(scores, published(tiny_reward(), PICTURES[:1] * 5, prompts))
    agree(scores[1], scores[2])
    assert abs(scores[1] - scores[3]) > 1e-3


def test_batches_of_1_and_of_16_score_alike(scorer):
    images = [picture(SIZES[seed % len(SIZES)], seed) for seed in range(16)]
    prompts = [" ".join([PROMPTS[seed % len(PROMPTS)]] * (seed + 1)) for seed in range(16)]
    alone = torch.cat([scorer([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    agree(scorer(images, prompts), alone)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_grey_and_opaque_pictures_score_as_the_authors_code_scores_them(scorer, mode):
    images = [image.convert(mode) for image in PICTURES]
    agree(scorer(images, PROMPTS), published(tiny_reward(), images, PROMPTS))


def test_a_file_in_half_precision_is_scored_in_single(parts, tmp_path):
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tiny_reward().state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    model = tiny_reward()
    model.load_state_dict(half)
    agree(IMAGEREWARD.load(parts | {"model": tmp_path / "half.pt"}, CPU)(PICTURES, PROMPTS), published(model, PICTURES, PROMPTS))


@pytest.mark.parametrize("name", [
    "blip.visual_encoder.patch_embed.proj.bias", "blip.text_encoder.encoder.layer.1.output.dense.bias", "mlp.layers.7.bias"])
def test_nan_stays_nan(parts, tmp_path, name):
    state = tiny_reward().state_dict()
    state[name][0] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    assert IMAGEREWARD.load(parts | {"model": tmp_path / "nan.pt"}, CPU)(PICTURES, PROMPTS).isnan().all()


def test_the_public_files_names_and_shapes_make_blip_large(tmp_path):
    with torch.device("meta"):  # ViT-L/16 at 224, med_config.json
        state = ImageReward(224, 1024, 24, 30524, 768, 12).state_dict()
    assert len(state) == 4 + 24 * 12 + 2 + 5 + 12 * 26 + 4 + 10
    assert state["blip.visual_encoder.blocks.23.attn.qkv.weight"].shape == (3072, 1024)
    assert state["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"].shape == (768, 1024)
    assert state["mlp.layers.6.weight"].shape == (16, 64) and state["mlp.layers.7.weight"].shape == (1, 16)
    torch.save(state, tmp_path / "ImageReward.pt")
    words = save_words(tmp_path / "words", [*WORDS, *(f"word{number}" for number in range(30522 - len(WORDS)))])
    IMAGEREWARD.load({"model": tmp_path / "ImageReward.pt", "tokenizer": words}, torch.device("meta"))
    model = load_reward(tmp_path / "ImageReward.pt", torch.device("meta"))
    unused = ("blip.vision_proj", "blip.text_proj")
    assert sum(tensor.numel() for tensor in model.parameters()) == sum(
        tensor.numel() for name, tensor in state.items() if tensor.is_floating_point() and not name.startswith(unused))
    vision, text = model.blip.visual_encoder.config, model.blip.text_encoder.config
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads, vision.num_hidden_layers) == (224, 16, 16, 24)
    assert (text.num_attention_heads, text.num_hidden_layers, text.max_position_embeddings) == (12, 12, 512)


def without(*beginnings: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tiny_reward().state_dict().items() if not name.startswith(beginnings)}


@pytest.mark.parametrize(("content", "message"), [
    ({"state_dict": without()}, "no usable blip.visual_encoder.blocks.0.mlp.fc1.weight"),
    ({"blip.visual_encoder.blocks.0.mlp.fc1.weight": 3}, "no usable blip.visual_encoder.blocks.0.mlp.fc1.weight"),
    ({0: torch.ones(2)}, "no usable blip.visual_encoder.blocks.0.mlp.fc1.weight"),
    (without("blip.text_encoder"), "no usable blip.text_encoder.encoder.layer.0.intermediate.dense.weight"),
    (without("mlp."), r"missing: mlp.layers.0.bias, .* and 7 more"),
    (without("blip.visual_encoder.blocks.1.attn.proj.bias"), r"\(missing: blip.visual_encoder.blocks.1.attn.proj.bias\)"),
    (without("blip.text_encoder.encoder.layer.0.cross"), "missing: blip.text_encoder.encoder.layer.0.crossattention.output"),
    (without() | {"blip.itm_head.weight": torch.ones(2)}, r"\(unknown: blip.itm_head.weight\)"),
    (without() | {"blip.visual_encoder.pos_embed": torch.ones(1, 12, 128)}, "of another shape: blip.visual_encoder.pos_embed"),
    (without() | {"blip.visual_encoder.blocks.0.mlp.fc1.weight": torch.ones(96, 24)}, "no multiple of 64"),
    (torch.ones(3), "holds a Tensor"),
])
def test_another_models_file_is_named(parts, tmp_path, content, message):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=rf"other\.pt .*{message}") as raised:
        IMAGEREWARD.load(parts | {"model": tmp_path / "other.pt"}, CPU)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:-1000], lambda whole: whole[:100], lambda whole: b"", lambda whole: b"<!DOCTYPE html><title>404</title>",
    lambda whole: b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_file_is_named(parts, tmp_path, damage):
    (tmp_path / "ImageReward.pt").write_bytes(damage(parts["model"].read_bytes()))
    with pytest.raises(UserError, match=r"ImageReward\.pt is ") as raised:
        IMAGEREWARD.load(parts | {"model": tmp_path / "ImageReward.pt"}, CPU)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("words", "message"), [
    (WORDS[:-1], rf"has {ROWS - 1} tokens .* the model's {ROWS}"),
    ((), "has no tokenizer that fits: its vocabulary has"),
])
def test_another_models_tokenizer_is_named(parts, tmp_path, words, message):
    folder = save_words(tmp_path / "words", words)
    if not words:
        (folder / "vocab.txt").unlink()
    with pytest.raises(UserError, match=rf"words .*{message}"):
        IMAGEREWARD.load(parts | {"tokenizer": folder}, CPU)


def test_a_tokenizer_that_is_no_json_is_named(parts, tmp_path):
    folder = save_words(tmp_path / "words", WORDS)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer in .*words") as raised:
        IMAGEREWARD.load(parts | {"tokenizer": folder}, CPU)
    assert "\n" not in str(raised.value)
