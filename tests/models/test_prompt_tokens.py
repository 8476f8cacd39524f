"""How many tokens of a prompt a model sees, where its tokenizers are shorter than the published ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

from seppo_fast.errors import UserError
from seppo_fast.models import open_model

PROMPTS = ["a photo of the red cat", "", "sky " * 200]


def shorten(folder: Path, **lengths: int) -> Path:
    """Set the `model_max_length` of tokenizers."""
    for part, length in lengths.items():
        file = folder / part / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))
    return folder


@pytest.mark.parametrize(("make", "lengths", "shape"), [
    (tiny_sd, {"tokenizer": 10}, (10, 32)), (tiny_sdxl, {"tokenizer": 10, "tokenizer_2": 10}, (10, 80)),
    (tiny_sd3, {"tokenizer": 10, "tokenizer_2": 10, "tokenizer_3": 6}, (16, 64)),
    (tiny_sd3, {part: 10**30 for part in ("tokenizer", "tokenizer_2", "tokenizer_3")}, (77 + 256, 64)), (tiny_flux, {}, (512, 32)),
    (tiny_flux, {"tokenizer": 100, "tokenizer_2": 6}, (6, 32))])
def test_conditions_have_the_shapes_that_the_model_says(make: Callable[[Path], Path], lengths: dict[str, int],
                                                        shape: tuple[int, int], tmp_path: Path) -> None:
    model = open_model(str(shorten(make(tmp_path / "model"), **lengths)))
    found = model.load_text("cpu")(PROMPTS)
    assert {name: tuple(value.shape[1:]) for name, value in found.items()} == model.condition_shapes
    assert model.condition_shapes["prompt_embeds"] == shape


def test_text_encoders_side_by_side_see_as_many_tokens(tmp_path: Path) -> None:
    folder = shorten(tiny_sd3(tmp_path / "model"), tokenizer_2=10)
    with pytest.raises(UserError, match=r"different lengths \(77 and 10 tokens\)"):
        open_model(str(folder))


def test_short_prompts_are_embedded_as_the_pipelines_do(tmp_path: Path) -> None:
    """The pipelines know T5's limit only where the caller gives it."""
    folder = shorten(tiny_sd3(tmp_path / "sd3"), tokenizer=10, tokenizer_2=10, tokenizer_3=6)
    with torch.no_grad():
        wanted, _, pooled, _ = StableDiffusion3Pipeline.from_pretrained(folder).encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=6)
    torch.testing.assert_close(open_model(str(folder)).load_text("cpu")(PROMPTS), {"prompt_embeds": wanted, "pooled": pooled})
    folder = shorten(tiny_flux(tmp_path / "flux"), tokenizer_2=6)
    with torch.no_grad():
        wanted, pooled, _ = FluxPipeline.from_pretrained(folder).encode_prompt(PROMPTS, None, max_sequence_length=6)
    torch.testing.assert_close(open_model(str(folder)).load_text("cpu")(PROMPTS), {"prompt_embeds": wanted, "pooled": pooled})
