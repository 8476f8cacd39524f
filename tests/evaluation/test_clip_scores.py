"""The scores on transformers' CLIP, each recomputed from its published definition by transformers' own processor and heads."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CLIP_PIXELS, CLIP_WIDTH, tiny_clip, tokenizer
from torch import nn
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from seppo_fast.errors import UserError
from seppo_fast.evaluation.scores.aesthetic import AESTHETIC
from seppo_fast.evaluation.scores.clip import center_pixels, load_clip, load_tokenizer
from seppo_fast.evaluation.scores.clipscore import CLIP_SCORE
from seppo_fast.evaluation.scores.pickscore import PICKSCORE
from seppo_fast.evaluation.scores.vendi import VENDI

CPU = torch.device("cpu")
SIZE, WIDTH = CLIP_PIXELS, CLIP_WIDTH
SIZES = ((28, 28), (61, 28), (30, 77), (64, 64), (20, 15))
PROMPTS = ("a cat", "a photo of the red sky", "", "Handwritten TWO, blue!", "the the the dog")


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Noise of a few pixels: something is left of it at 28x28."""
    levels = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.NEAREST)


PICTURES = [picture(size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def published_cosines(folder: Path, images=PICTURES, prompts=PROMPTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines (N,) and image embeddings (N, D), as the model cards compute them: processor, features, norms."""
    model, words = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    ids = words(list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        image = model.get_image_features(**processor(list(images), return_tensors="pt")).pooler_output
        text = model.get_text_features(**ids).pooler_output
    image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    return (image @ text.T).diagonal(), image


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("end", [None, 2])
def test_pickscore_is_the_cosine_times_the_learnt_scale_whatever_pads_and_whatever_end_the_config_names(tmp_path, pad, end):
    folder = tiny_clip(tmp_path / "clip", pad, end)
    scores = PICKSCORE.load({"model": folder, "tokenizer": folder}, CPU)(PICTURES, PROMPTS)
    expected = published_cosines(folder)[0] * torch.exp(torch.tensor(2.6592))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert scores.dtype == torch.float32 and scores.shape == (5,) and scores.std() > 0.5


def test_clip_score_is_100_times_the_cosine_and_never_below_0(folder):
    scores = CLIP_SCORE.load({"model": folder}, CPU)(PICTURES, PROMPTS)
    cosines = published_cosines(folder)[0]
    assert (cosines < 0).any() and (cosines > 0).any()
    torch.testing.assert_close(scores, torch.where(cosines > 0, 100 * cosines, 0), rtol=1e-4, atol=1e-3)


def test_a_long_prompt_is_cut_with_the_end_token_kept(folder):
    words, model = tokenizer(), CLIPModel.from_pretrained(folder).eval()
    prompt = "a red cat " * 60
    ids = words(prompt, add_special_tokens=False).input_ids
    assert len(ids) == 180
    with torch.no_grad():
        text = model.get_text_features(torch.tensor([[words.bos_token_id, *ids[:75], words.eos_token_id]])).pooler_output[0]
    image = published_cosines(folder)[1][0]
    scores = CLIP_SCORE.load({"model": folder}, CPU)([PICTURES[0]] * 2, [prompt, "a cat"])
    torch.testing.assert_close(scores[0], 100 * torch.clamp(image @ text / text.norm(), min=0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["mlp", "linear"])
def test_aesthetic_is_the_public_head_on_the_embedding_of_length_1(folder, tmp_path, name):
    random = torch.Generator().manual_seed(3)
    widths = (WIDTH, 1024, 128, 64, 16, 1) if name == "mlp" else (WIDTH, 1)
    places = (0, 2, 4, 6, 7)
    state, expected = OrderedDict(), published_cosines(folder, PICTURES[:1] + PICTURES[3:])[1]
    for place, before, after in zip(places, widths, widths[1:], strict=False):
        weight, bias = torch.randn(after, before, generator=random) / before**0.5, torch.randn(after, generator=random)
        expected = expected @ weight.T + bias
        prefix = f"layers.{place}." if name == "mlp" else ""
        state |= {f"{prefix}weight": weight, f"{prefix}bias": bias}
    torch.save(state, tmp_path / "head.pth")
    scorer = AESTHETIC.load({"model": tmp_path / "head.pth", "clip": folder}, CPU)
    scores = scorer(PICTURES[:1] + PICTURES[3:], [""] * 3)
    torch.testing.assert_close(scores, expected[:, 0], rtol=1e-4, atol=1e-4)
    assert scores.std() > 0.01


def test_center_crops_round_an_odd_margin_as_their_libraries_do():
    image = picture((SIZE + 35, SIZE), 7)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in
                 ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    expected = (levels - mean) / std
    torch.testing.assert_close(center_pixels([image], SIZE)[0], expected[:, :, 17:17 + SIZE])
    torch.testing.assert_close(center_pixels([image], SIZE, half=lambda margin: round(margin / 2))[0], expected[:, :, 18:18 + SIZE])


def test_vendis_embedder_gives_the_image_embeddings(folder):
    embeddings = VENDI.load({"model": folder}, CPU)(PICTURES)
    torch.testing.assert_close(embeddings, published_cosines(folder)[1], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def scorers(folder, tmp_path_factory) -> dict:
    head = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save({"weight": torch.linspace(-2, 2, WIDTH)[None], "bias": torch.ones(1)}, head)
    parts = {"pickscore": {"model": folder, "tokenizer": folder}, "clipscore": {"model": folder},
             "aesthetic": {"model": head, "clip": folder}}
    return {score.name: score.load(parts[score.name], CPU) for score in (PICKSCORE, CLIP_SCORE, AESTHETIC)}


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic"])
def test_batches_of_1_and_of_16_score_alike(scorers, name):
    images = [picture(SIZES[seed % len(SIZES)], seed) for seed in range(16)]
    prompts = [PROMPTS[seed % len(PROMPTS)] * (seed + 1) for seed in range(16)]
    together = scorers[name](images, prompts)
    alone = torch.cat([scorers[name]([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert together.std() > 0.05


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic"])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_score_as_their_rgb(scorers, name, mode):
    images = [image.convert(mode) for image in PICTURES]
    scores = scorers[name](images, PROMPTS)
    torch.testing.assert_close(scores, scorers[name]([image.convert("RGB") for image in images], PROMPTS))
    assert scores.std() > 0.05


def test_a_broken_model_scores_nan_and_not_a_number(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["visual_projection.weight"] *= float("nan")
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    torch.save(nn.Linear(WIDTH, 1).state_dict(), tmp_path / "head.pth")
    for scorer in (PICKSCORE.load({"model": broken, "tokenizer": broken}, CPU), CLIP_SCORE.load({"model": broken}, CPU),
                   AESTHETIC.load({"model": tmp_path / "head.pth", "clip": broken}, CPU)):
        assert scorer(PICTURES, PROMPTS).isnan().all()


def test_old_files_load_pickled_and_with_position_ids(folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    state = load_file(old / "model.safetensors")
    state |= {f"{tower}_model.embeddings.position_ids": torch.arange(77)[None] for tower in ("text", "vision")}
    (old / "model.safetensors").unlink()
    torch.save(state, old / "pytorch_model.bin")
    scores, expected = (CLIP_SCORE.load({"model": path}, CPU)(PICTURES, PROMPTS) for path in (old, folder))
    assert torch.equal(scores, expected)


def edited(folder: Path, copy: Path, **keys) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | keys))
    return copy


def test_a_folder_that_does_not_fit_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"bert/config\.json describes a model of type 'bert'"):
        load_clip(edited(folder, tmp_path / "bert", model_type="bert"), CPU)
    with pytest.raises(UserError, match=r"wide/model\.safetensors"):
        load_clip(edited(folder, tmp_path / "wide", projection_dim=WIDTH + 1), CPU)
    heads = json.loads((folder / "config.json").read_text())["vision_config"] | {"num_attention_heads": 5}
    with pytest.raises(UserError, match=r"heads/model\.safetensors .*not a multiple of the number of attention heads"):
        load_clip(edited(folder, tmp_path / "heads", vision_config=heads), CPU)
    cut = shutil.copytree(folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut/model\.safetensors has \d+ bytes"):
        load_clip(cut, CPU)
    state = load_file(folder / "model.safetensors")
    partial = shutil.copytree(folder, tmp_path / "partial")
    kept = {name: tensor for name, tensor in state.items() if "text_model" not in name}
    save_file(kept, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"partial/model\.safetensors lacks \d+ weights .* text_model"):
        load_clip(partial, CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/config\.json is missing"):
        load_clip(tmp_path / "empty", CPU)
    with pytest.raises(UserError, match=r"empty has no tokenizer that fits: its vocabulary has 2 tokens"):
        load_tokenizer(tmp_path / "empty", CLIPModel.from_pretrained(folder))


def test_an_aesthetic_head_of_another_model_is_named(folder, tmp_path):
    torch.save(nn.Linear(WIDTH + 8, 1).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=rf"other\.pth does not hold the weights of an aesthetic head of {WIDTH} inputs"):
        AESTHETIC.load({"model": tmp_path / "other.pth", "clip": folder}, CPU)
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "another.pth")
    with pytest.raises(UserError, match=r"another\.pth .*missing: layers\.0\.bias, .* and 7 more; unknown: encoder\.weight\)"):
        AESTHETIC.load({"model": tmp_path / "another.pth", "clip": folder}, CPU)
