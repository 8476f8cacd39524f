"""The plan's bytes of VAE and text encoders against what they really allocate, and where in the plan they count."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import CLOSE, allocated
from tiny import tiny_animatediff, tiny_flux, tiny_sd, tiny_sd3
from tiny_wan import tiny_wan

from seppo_fast.config import Data
from seppo_fast.configfile import Batch, Config, batch_plan, load_config, parse_config
from seppo_fast.models import Model, common, open_model
from seppo_fast.models.published import published_model
from seppo_fast.models.sd import StableDiffusion
from seppo_fast.planning.cost import estimate
from seppo_fast.planning.dry_run import dry_run
from seppo_fast.planning.encoders import encoder_bytes, encoding_bytes, text_bytes, vae_bytes
from seppo_fast.planning.network_memory import inference

Settings = Callable[..., dict[str, Any]]
WIDE = {"base_dim": 16}  # beside its tensors, what is allocated for other things is little


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(str(tiny_wan(tmp_path_factory.mktemp("encoders") / "wan", vae=WIDE)), frames=9)


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3, tiny_flux, tiny_wan])
def test_embedding_is_what_the_cpu_allocates(make: Callable[..., Path], tmp_path: Path) -> None:
    """Of many prompts at once, and of the weights."""
    model, prompts = open_model(str(make(tmp_path / "model"))), ["a cat"] * 64
    weights, peak = text_bytes(model, len(prompts))
    embed = model.load_text("cpu")
    embed(prompts)
    assert peak == pytest.approx(allocated(lambda: embed(prompts)), rel=CLOSE)
    files = [file for part in model.text_encoders for file in model.directory.weights[part].files]
    assert weights == pytest.approx(sum(file.stat().st_size for file in files), rel=CLOSE)


@pytest.mark.parametrize("at_once", [2, 8])
def test_encoding_images_is_what_the_cpu_allocates(at_once: int, tmp_path: Path) -> None:
    model = open_model(str(tiny_sd(tmp_path / "model")))
    data = Data(source="d", resolution=64, encode_batch_size=at_once)
    vae = model.load_vae("cpu")
    real = allocated(lambda: model.encode(vae, torch.zeros(at_once, 3, 64, 64), at_once))
    assert encoding_bytes(model, data) == pytest.approx(real, rel=CLOSE)


def test_encoding_a_clip_is_what_the_cpu_allocates(tmp_path: Path) -> None:
    """Of a VAE of images a few frames at a time."""
    model = open_model(str(tiny_animatediff(tmp_path / "model")))
    data = Data(source="d", resolution=64, encode_batch_size=3, video={"frames": 8})
    vae = model.load_vae("cpu")
    real = allocated(lambda: model.encode(vae, torch.zeros(1, 8, 3, 64, 64), 3))
    assert encoding_bytes(model, data) == pytest.approx(real, rel=CLOSE)


@pytest.mark.parametrize("frames", [9, 21])
def test_a_3d_vae_is_what_the_cpu_allocates(frames: int, wan: Model) -> None:
    """It keeps frames between its pieces. Two clips at once, because of one PyTorch unfolds the inputs of small convolutions."""
    loaded, shape, kept = wan.load_vae("cpu"), wan.latent_shape(64, frames), []
    with torch.device("meta"):
        empty, clips, latents = wan.empty_vae(), torch.empty(2, 3, frames, 64, 64), torch.empty(2, *shape)
    encoding = clips.nbytes + inference(lambda: common.encode(empty, clips)).peak
    decoding = inference(lambda: common.decode(empty, latents, wan.latent_scale)).peak
    assert encoding == pytest.approx(allocated(lambda: common.encode(loaded, torch.zeros(clips.shape))), rel=CLOSE)
    real = allocated(lambda: kept.append(common.decode(loaded, torch.zeros(latents.shape), wan.latent_scale)))
    assert decoding == pytest.approx(real, rel=CLOSE)
    one = encoding_bytes(wan, Data(source="d", resolution=64, video={"frames": frames}))
    weights, one_decoding = vae_bytes(wan, shape)
    assert (2 * one, 2 * one_decoding) == pytest.approx((encoding, decoding), rel=0.01), "the plan's is one clip"
    assert weights == pytest.approx(wan.directory.weights["vae"].files[0].stat().st_size, rel=0.05)


def test_text_encoders_that_rest_are_in_the_plan(settings: Settings) -> None:
    """On the device beside what stays there, while they embed; in host memory otherwise."""
    said = {}
    for cached in (True, False, "auto"):
        said[cached] = dry_run(parse_config(settings(**{"seppo.data.cache_prompts": cached})), 1)
    assert said[True].count("prompts ") < said[False].count("prompts ") and "host memory " not in said[True] + said["auto"]
    assert re.search(r"\n  host memory +0\.\d+ MB a rank for the text encoders, while they rest\n", said[False])
    cost = estimate(open_model(settings()["seppo"]["model"]["path"]), *planned(parse_config(settings())))
    embeds = replace(cost, embeds=True)
    assert embeds.peaks["prompts"] == cost.standing + cost.kept_gradients + cost.encoders.text + cost.encoders.embedding
    assert {name: size for name, size in embeds.peaks.items() if name != "prompts"} == cost.peaks


def planned(config: Config) -> tuple[Config, Batch]:
    return config, batch_plan(config.deepspeed, 1)


def test_what_is_made_before_the_training_is_in_the_plan(settings: Settings) -> None:
    """FLUX's text encoders have 19.5 GB in fp32. No network is beside them then, nor a sampler's graph."""
    config = load_config("ds_a100_flux.json")
    flux = encoder_bytes(published_model(config.seppo.model.path), config.seppo)
    assert 19.5e9 < flux.text < 19.6e9 and flux.embedding < flux.looking < 2e9, "four prompts for a grid at once"
    small = parse_config(settings())
    cost = replace(estimate(open_model(small.seppo.model.path), *planned(small)), encoders=flux)
    assert cost.peaks["encoding"] == cost.reserved == flux.text + flux.looking > cost.kept_graphs > 0
    images = replace(cost, encoders=replace(flux, encoding=30 * 10**9))
    assert images.reserved == flux.vae + 30 * 10**9


@pytest.mark.parametrize(("path", "parameters"), [
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 5_680_910_336), ("Qwen/Qwen-Image", 8_292_166_656),
    ("black-forest-labs/FLUX.2-klein-4B", 4_022_468_096)])
def test_the_published_text_encoders(path: str, parameters: int) -> None:
    """UMT5-XXL's encoder, Qwen2.5-VL-7B and Qwen3-4B, with a few tables of positions."""
    assert 4 * parameters <= text_bytes(published_model(path), 1)[0] < 4.0001 * parameters


def test_clips_that_are_streamed_are_in_the_plan(settings: Settings, tmp_path: Path) -> None:
    """The VAE stays on the device, and encodes beside the training."""
    model = tiny_animatediff(tmp_path / "model")
    changes = {"seppo.model.path": str(model), "seppo.data.source": None, "seppo.data.video": {"frames": 4, "choice": "window"}}
    config = parse_config(settings(**changes))
    assert "none: clips are decoded and encoded while it trains" in dry_run(config, 1)
    cost = estimate(open_model(str(model)), *planned(config))
    more = {name: replace(cost, streams=True).peaks[name] - size for name, size in cost.peaks.items()}
    assert more.pop("encoding") == 0 and more.pop("micro-batch") == cost.encoders.vae + cost.encoders.encoding
    assert set(more.values()) == {cost.encoders.vae}


def test_prompts_of_grids_are_embedded_before_the_networks_are_there(settings: Settings, train: Any, monkeypatch: pytest.MonkeyPatch
                                                                    ) -> None:
    loaded: list[str] = []

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **named: (loaded.append(name), real(*args, **named))[1]

    for name in ("load_text", "load_denoiser"):
        monkeypatch.setattr(StableDiffusion, name, noting(name, getattr(StableDiffusion, name)))
    train(settings(**{"seppo.samples.every": 1, "seppo.iterations": 1, "seppo.updates_per_iteration": 1}))
    assert "load_text" in loaded and "load_denoiser" in loaded and loaded == sorted(loaded, reverse=True), "texts first"
