"""Prompt embeddings without a cache: to the bit the same, made a window at a time, each once."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from data.data_files import cached, settings, write_folder
from safetensors.torch import load_file, save_file
from tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from seppo_fast.data.latents import LatentCache
from seppo_fast.data.prompt_encoder import LARGEST_CACHE, PromptEncoder, keeps_prompts, prompt_bytes
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.planning.plan import of_prompts

KINDS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture
def encoded() -> Iterator[list[int]]:
    """How many prompts were in each call of a text encoder meanwhile."""
    calls: list[int] = []

    def note(module: nn.Module, given: tuple, result: object) -> None:
        if isinstance(module, CLIPTextModel | T5EncoderModel):
            calls.append(len(result[0]))

    hook = nn.modules.module.register_module_forward_hook(note)
    yield calls
    hook.remove()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_give_the_same_bytes(kind: str, dtype: str, tmp_path: Path) -> None:
    model = open_model(str(KINDS[kind](tmp_path / "model")))
    data = settings(write_folder(tmp_path / "d", 9), tmp_path, cache_dtype=dtype)
    kept = cached(model, data.model_copy(update={"cache_prompts": True}), tmp_path)
    made = cached(model, data.model_copy(update={"cache_prompts": False}), tmp_path)
    assert isinstance(made.texts, PromptEncoder) and not isinstance(kept.texts, PromptEncoder)
    assert kept.folder == made.folder and kept.content == made.content
    made.texts.hold([3, 1, 3, 7])
    for prompts in ([0], [3, 0, 3, 1], [5], [7, 6]):
        one, other = kept.embeddings(prompts), made.embeddings(prompts)
        assert one.keys() == other.keys() == dict(model.condition_shapes).keys()
        for name, values in one.items():
            assert torch.equal(values, other[name]) and values.dtype == other[name].dtype == torch.float32
            assert values.shape == (len(prompts), *model.condition_shapes[name])
    stored = sum(values.numel() for values in kept.embeddings([0]).values()) * (2 if dtype == "float16" else 4)
    assert prompt_bytes(model, data) == stored


def test_a_window_is_embedded_once_one_prompt_a_call(model, tmp_path: Path, encoded: list[int]) -> None:
    """The empty prompt stays; of the next window only what is new is embedded, and what it lacks is forgotten."""
    data = settings(write_folder(tmp_path / "d", 9), tmp_path, cache_prompts=False)
    cache = cached(model, data, tmp_path)
    assert encoded == [1] and not (cache.folder / "prompts").exists()
    cache.texts.hold([3, 2, 3, 3, 2, 0])
    assert encoded == [1] * 3
    cache.embeddings([2, 3, 3, 0])
    assert encoded == [1] * 3
    cache.texts.hold([3, 4])
    assert encoded == [1] * 4 and set(cache.texts.held) == {0, 3, 4}
    cache.embeddings([4, 2])
    assert encoded == [1] * 5


def test_equal_weights_rest_in_host_memory(model, tmp_path: Path) -> None:
    """What comes back from the device is what was there before."""
    cache = cached(model, settings(write_folder(tmp_path / "d", 3), tmp_path, cache_prompts=False), tmp_path)
    (encoder,) = cache.texts.encoders
    weights = {parameter.data_ptr() for parameter in encoder.parameters()}
    assert weights == {host.data_ptr() for _, host in cache.texts.on_host}
    before = cache.embeddings([1])
    cache.texts.hold([])
    assert weights == {parameter.data_ptr() for parameter in encoder.parameters()}
    assert all(torch.equal(values, before[name]) for name, values in cache.embeddings([1]).items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_encoder_leaves_the_gpu(model, tmp_path: Path) -> None:
    data = settings(write_folder(tmp_path / "d", 9), tmp_path)
    made = cached(model, data.model_copy(update={"cache_prompts": False}), tmp_path, device="cuda")
    kept = cached(model, data.model_copy(update={"cache_prompts": True}), tmp_path, device="cuda")
    made.texts.hold(range(8))
    tensors = [tensor for encoder in made.texts.encoders for tensor in (*encoder.parameters(), *encoder.buffers())]
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    assert all(torch.equal(values, made.embeddings(range(8))[name]) for name, values in kept.embeddings(range(8)).items())


def test_auto_goes_by_the_size_of_all_embeddings(model, tmp_path: Path) -> None:
    data = settings(tmp_path, tmp_path)
    most = LARGEST_CACHE // prompt_bytes(model, data)
    assert data.cache_prompts == "auto" and keeps_prompts(model, data, most) and not keeps_prompts(model, data, most + 1)
    for choice in (True, False):
        assert keeps_prompts(model, data.model_copy(update={"cache_prompts": choice}), most + 1) == choice


def test_a_folder_with_latents_alone_gets_its_embeddings_later(model, tmp_path: Path) -> None:
    data = settings(write_folder(tmp_path / "d", 3), tmp_path)
    folder = cached(model, data.model_copy(update={"cache_prompts": False}), tmp_path).folder
    written = {file: file.stat().st_mtime_ns for file in folder.rglob("*.arrow")}
    assert cached(model, data, tmp_path).folder == folder and (folder / "prompts").exists()
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())
    with pytest.raises(UserError, match="the cache is not finished"):
        LatentCache(cached(model, settings(write_folder(tmp_path / "e", 4), tmp_path, cache_prompts=False), tmp_path).folder)


@pytest.mark.parametrize("choice", [True, False])
def test_an_embedding_that_overflows_is_named_both_ways(choice: bool, tmp_path: Path) -> None:
    folder = tiny_sd(tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    (name,) = (name for name in weights if name.endswith("final_layer_norm.bias"))
    save_file(weights | {name: weights[name] + 1e6}, file, {"format": "pt"})
    data = settings(write_folder(tmp_path / "d", 3), tmp_path, cache_prompts=choice)
    with pytest.raises(UserError) as caught:
        cached(open_model(str(folder)), data, tmp_path)
    assert str(caught.value).startswith("prompt_embeds of the prompt '' is not finite in float16; set seppo.data.cache_dtype")


def test_captions_that_are_cut_off_are_counted_without_a_cache(model, tmp_path: Path, encoded: list[int]) -> None:
    folder = write_folder(tmp_path / "d", 3)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[1]["text"] = "a cat " * 100
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = []
    for choice in (True, False):
        del encoded[:]
        cached(model, settings(folder, tmp_path, cache_prompts=choice), tmp_path)
        listed.append((tmp_path / "run" / "truncated.jsonl").read_bytes())
        (tmp_path / "run" / "truncated.jsonl").unlink()
    assert listed[0] == listed[1] and listed[0].count(b"\n") == 1 and encoded == [1]


@pytest.mark.parametrize(("choice", "rows", "words"), [
    ("auto", 10**6, "4.93 GB, beside the latents"), ("auto", 10**8, "up to 64 GB in all, otherwise embedded"),
    ("auto", None, "up to 64 GB in all, otherwise embedded"), (True, 10**8, "prompt, beside the latents"),
    (False, 10, "prompt, embedded when they are needed, by text encoders that rest in host memory")])
def test_the_plan_says_which_way(choice: object, rows: int | None, words: str, model, tmp_path: Path) -> None:
    told = of_prompts(settings(tmp_path, tmp_path, cache_prompts=choice), model, rows)
    assert told.startswith("0.00493 MB each different prompt") and words in told
