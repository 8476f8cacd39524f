"""HPS v2 from open_clip's checkpoints, recomputed by a small ViT written as open_clip writes it."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPModel

from seppo_fast.errors import UserError
from seppo_fast.evaluation.scores.clip import from_open_clip, open_clip_config, padded_pixels
from seppo_fast.evaluation.scores.hps import HPS_V2, HPS_V21

CPU = torch.device("cpu")
SIZE, HEADS = 28, 16
WORDS = tokenizer()
PROMPTS = ("a cat", "a photo of the red sky", "", "Handwritten TWO, blue!", "the the the dog")
SIZES = ((28, 28), (61, 28), (30, 77), (64, 64), (20, 15))


class Block(nn.Module):
    def __init__(self, width: int, mlp: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, mlp), gelu=nn.GELU(), c_proj=nn.Linear(mlp, width)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width: int, layers: int, heads: int = HEADS):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, 4 * width, heads) for _ in range(layers))


class Visual(nn.Module):
    def __init__(self, size: int, patch: int, width: int, layers: int, dimensions: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(width), Tower(width, layers), nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, dimensions))


class OpenClip(nn.Module):
    """open_clip's module tree, whose parameters have the public file's names and shapes."""

    def __init__(self, size: int, width: int, layers: int, text_width: int, text_layers: int, vocabulary: int, dimensions: int,
                 heads: int = HEADS):
        super().__init__()
        self.visual = Visual(size, 14, width, layers, dimensions)
        self.transformer, self.ln_final = Tower(text_width, text_layers, heads), nn.LayerNorm(text_width)
        self.token_embedding = nn.Embedding(vocabulary, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(77, text_width))
        self.text_projection = nn.Parameter(torch.randn(text_width, dimensions))
        self.logit_scale = nn.Parameter(torch.ones([]))

    def encode_image(self, pixels: Tensor) -> Tensor:
        v = self.visual
        patches = v.conv1(pixels).flatten(2).permute(2, 0, 1)  # open_clip's order then: tokens, images, channels
        x = torch.cat([v.class_embedding.expand(1, len(pixels), -1), patches]) + v.positional_embedding[:, None]
        x = v.ln_pre(x)
        for block in v.transformer.resblocks:
            x = block(x)
        return v.ln_post(x[0]) @ v.proj

    def encode_text(self, ids: Tensor) -> Tensor:
        x = (self.token_embedding(ids) + self.positional_embedding).transpose(0, 1)
        for block in self.transformer.resblocks:
            x = block(x, torch.full((77, 77), -torch.inf).triu(1))
        return self.ln_final(x)[ids.argmax(dim=-1), torch.arange(len(ids))] @ self.text_projection


def open_clip_ids(prompts) -> Tensor:
    """As open_clip's `tokenize`: start, words, end, then zeros to 77; a longer text loses its tail but not its end."""
    ids = torch.zeros(len(prompts), 77, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        tokens = [WORDS.bos_token_id, *WORDS(prompt, add_special_tokens=False).input_ids, WORDS.eos_token_id][:77]
        row[:len(tokens)] = torch.tensor(tokens)
        if len(tokens) == 77:
            row[-1] = WORDS.eos_token_id
    return ids


def tiny_open_clip() -> OpenClip:
    torch.manual_seed(2)
    model = OpenClip(SIZE, 160, 2, 64, 2, len(WORDS), 40).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at their initial values LayerNorm and biases could be left out unnoticed
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.NEAREST)


PICTURES = [picture(size, seed) for seed, size in enumerate(SIZES)]


def hpsv2_pixels(image: Image.Image) -> Tensor:
    """Long side to 28 by an antialiased bicubic on floats (here PIL's), black around, CLIP's normalisation."""
    scale = SIZE / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    levels = np.zeros((3, SIZE, SIZE), dtype=np.float32)
    left, top = (SIZE - width) // 2, (SIZE - height) // 2
    for channel in range(3):
        plane = Image.fromarray(np.asarray(image)[..., channel].astype(np.float32) / 255)
        levels[channel, top:top + height, left:left + width] = plane.resize((width, height), Image.Resampling.BICUBIC)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (torch.from_numpy(levels) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def published(model: OpenClip, images, prompts) -> Tensor:
    """hpsv2's cosine, times 100 as the paper's tables."""
    image = model.encode_image(torch.stack([hpsv2_pixels(image) for image in images]))
    return 100 * (normalize(image, dim=-1) * normalize(model.encode_text(open_clip_ids(prompts)), dim=-1)).sum(dim=-1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hps")
    WORDS.save_pretrained(folder / "words")
    torch.save({"epoch": 1, "name": "HPS", "state_dict": tiny_open_clip().state_dict()}, folder / "HPS_v2_compressed.pt")
    return {"model": folder / "HPS_v2_compressed.pt", "tokenizer": folder / "words"}


@pytest.fixture(scope="module")
def scorer(parts):
    return HPS_V2.load(parts, CPU)


def test_hps_is_100_times_the_cosine_of_open_clips_model(scorer):
    scores = scorer(PICTURES, PROMPTS)
    torch.testing.assert_close(scores, published(tiny_open_clip(), PICTURES, PROMPTS), rtol=1e-4, atol=1e-3)
    assert scores.dtype == torch.float32 and scores.std() > 1


def test_a_long_prompt_is_cut_as_open_clip_cuts_it(scorer):
    prompts = ["a red cat " * 60, "a cat " * 37 + "dog", "a cat " * 38]
    expected = published(tiny_open_clip(), PICTURES[:3], prompts)
    torch.testing.assert_close(scorer(PICTURES[:3], prompts), expected, rtol=1e-4, atol=1e-3)


def test_prompts_are_cleaned_as_open_clips_tokenizer_cleans_them(scorer):
    dirty = ["a “red” dog’s sky", "a cat &amp;amp; the dog", " blue\n\t sky "]
    clean = ["a \"red\" dog's sky", "a cat & the dog", "blue sky"]
    expected = published(tiny_open_clip(), PICTURES[:3], clean)
    torch.testing.assert_close(scorer(PICTURES[:3], dirty), expected, rtol=1e-4, atol=1e-3)
    assert ((published(tiny_open_clip(), PICTURES[:2], dirty[:2]) - expected[:2]).abs() > 0.1).all()


def test_pictures_are_padded_with_black_and_not_cropped():
    for image in PICTURES:
        torch.testing.assert_close(padded_pixels([image], SIZE)[0], hpsv2_pixels(image), rtol=1e-4, atol=1e-4)


def test_batches_of_1_and_of_16_score_alike(scorer):
    images = [picture(SIZES[seed % len(SIZES)], seed) for seed in range(16)]
    prompts = [PROMPTS[seed % len(PROMPTS)] * (seed + 1) for seed in range(16)]
    alone = torch.cat([scorer([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    torch.testing.assert_close(scorer(images, prompts), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_score_as_their_rgb(scorer, mode):
    images = [image.convert(mode) for image in PICTURES]
    expected = published(tiny_open_clip(), [image.convert("RGB") for image in images], PROMPTS)
    torch.testing.assert_close(scorer(images, PROMPTS), expected, rtol=1e-4, atol=1e-3)


def test_a_file_in_half_precision_is_scored_in_single(parts, tmp_path):
    half = {name: tensor.half() for name, tensor in tiny_open_clip().state_dict().items()}
    torch.save({"state_dict": half}, tmp_path / "HPS_v2.1_compressed.pt")
    scores = HPS_V21.load(parts | {"model": tmp_path / "HPS_v2.1_compressed.pt"}, CPU)(PICTURES, PROMPTS)
    model = tiny_open_clip()
    model.load_state_dict(half)
    torch.testing.assert_close(scores, published(model, PICTURES, PROMPTS), rtol=1e-4, atol=1e-3)


def test_the_public_files_names_and_shapes_make_laions_vit_h_14():
    with torch.device("meta"):  # open_clip's model_configs/ViT-H-14.json
        state = OpenClip(224, 1280, 32, 1024, 24, 49408, 1024).state_dict()
        config = open_clip_config(state)
        expected, renamed = CLIPModel(config).state_dict(), from_open_clip(state)
    assert len(state) == 12 * (32 + 24) + 14
    shapes, wanted = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (renamed, expected))
    assert shapes == wanted
    vision, text = config.vision_config, config.text_config
    for tower, sizes in ((vision, (1280, 16, 5120, 32)), (text, (1024, 16, 4096, 24))):
        assert (tower.hidden_size, tower.num_attention_heads, tower.intermediate_size, tower.num_hidden_layers) == sizes
    assert (vision.image_size, vision.patch_size, config.projection_dim, text.vocab_size, text.max_position_embeddings) == (
        224, 14, 1024, 49408, 77)
    assert vision.hidden_act == text.hidden_act == "gelu" and vision.layer_norm_eps == text.layer_norm_eps == 1e-5


def without(*endings: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tiny_open_clip().state_dict().items() if not name.endswith(endings)}


@pytest.mark.parametrize(("content", "message"), [
    (tiny_open_clip().state_dict(), 'has no "state_dict"'),
    ({"state_dict": {"blip.weight": torch.ones(2)}}, "is no open_clip checkpoint of a vision transformer"),
    ({"state_dict": 3}, 'has no "state_dict"'),
    ({"state_dict": without("1.attn.in_proj_bias")}, r"missing: text_model.encoder.layers.1.self_attn.k_proj.bias, .* and 3 more"),
    ({"state_dict": without() | {"score_predictor.weight": torch.ones(2)}}, "unknown: score_predictor.weight"),
    ({"state_dict": without() | {"logit_scale": torch.ones(2)}}, r"of another shape: logit_scale \(2,\) for \(\)"),
    ({"state_dict": without() | {"visual.proj": "text"}}, 'has no "state_dict" of tensors'),
    ({"state_dict": without("positional_embedding")}, "lacks 'visual.positional_embedding'"),
    ({"state_dict": OpenClip(SIZE, 160, 1, 72, 1, len(WORDS), 40, heads=8).state_dict()}, r"a width of 16 heads \(it is 72\)"),
])
def test_another_models_file_is_named(parts, tmp_path, content, message):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=rf"other\.pt .*{message}") as raised:
        HPS_V2.load(parts | {"model": tmp_path / "other.pt"}, CPU)
    assert "\n" not in str(raised.value)


def test_another_models_tokenizer_is_named(parts, tmp_path):
    (tmp_path / "words").mkdir()
    with pytest.raises(UserError, match=r"words has no tokenizer that fits"):
        HPS_V2.load(parts | {"tokenizer": tmp_path / "words"}, CPU)
