"""The VAE in tiles and slices: the same pictures but for the seams, less memory, and caches that do not mix."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from allocations import CLOSE, allocated
from tiny import PIXELS, tiny_sd
from tiny_qwen import tiny_qwen
from tiny_wan import tiny_wan

from seppo_fast.config import Data
from seppo_fast.data.fingerprint import made_of
from seppo_fast.data.sources import open_source
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.vae_memory import PLAIN, VaeMemory, with_vae_memory
from seppo_fast.planning.encoders import vae_bytes

# The 2.2 one takes patches of pixels.
FAMILIES = {"sd": tiny_sd, "qwen": tiny_qwen, "wan 2.1": tiny_wan, "wan 2.2": partial(tiny_wan, expand_timesteps=True, vae=dict(
    channels=6, patch_size=2, in_channels=12, out_channels=12, is_residual=True, decoder_base_dim=12, scale_factor_spatial=8))}
TILING, SLICING = VaeMemory(tiling=True), VaeMemory(slicing=True)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("models") / "model")


def configure(folder, **changes) -> Path:
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


def opened(folder, memory):
    model = with_vae_memory(open_model(str(folder), frames=5), memory)
    network = model.load_vae("cpu")
    assert (network.use_tiling, network.use_slicing) == (memory.tiling, memory.slicing)
    fixed = hasattr(network, "tile_sample_min_height")
    side = 2 * PIXELS if fixed else PIXELS
    if fixed and memory.tiling:  # smaller than the published tiles, for less work
        network.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
    return model, network, side


@torch.no_grad()
def both(folder, memory, times):
    """Latents and pixels of two samples whose sides are `times` those of a tile."""
    model, network, side = opened(folder, memory)
    shape = (2, *[5] * model.video, 3, times * side, times * side)
    mean, std = model.encode(network, torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    latents = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    return mean, std, model.decode(network, latents)


def test_what_is_larger_than_a_tile_is_nearly_the_same_and_what_is_not_the_same(folder):
    for plain, tiled in zip(both(folder, PLAIN, 1), both(folder, TILING, 1), strict=True):
        assert torch.equal(plain, tiled)
    for plain, tiled in zip(both(folder, PLAIN, 3), both(folder, TILING, 3), strict=True):
        assert plain.shape == tiled.shape and not torch.equal(plain, tiled)
        # Norms see a tile alone, and random weights make much of it; at a wrong place there would be no likeness at all.
        assert torch.corrcoef(torch.stack([plain.flatten(), tiled.flatten()]))[0, 1] > 0.7


def test_slices_are_the_same(folder):
    for plain, sliced in zip(both(folder, PLAIN, 2), both(folder, SLICING, 2), strict=True):
        torch.testing.assert_close(plain, sliced, rtol=0, atol=1e-6)


def test_tiles_take_less_memory_and_the_plan_knows_it(tmp_path):
    folder = tiny_sd(tmp_path / "sd")
    configure(folder, sample_size=64)
    latents, sizes = torch.zeros(1, 4, 96, 96), {}
    for memory in (PLAIN, TILING):
        model, network, _ = opened(folder, memory)
        decoding, kept = vae_bytes(model, latents.shape[1:])[1], []
        sizes[memory] = allocated(lambda model=model, network=network, kept=kept: kept.append(model.decode(network, latents)))
        assert decoding == pytest.approx(sizes[memory], rel=CLOSE)
    assert sizes[TILING] < 0.5 * sizes[PLAIN]


def test_tiles_have_caches_of_their_own_and_slices_have_not(sd, demonstrations):
    data = Data(source=str(demonstrations), resolution=16)
    source = open_source(data, needs_loser=False, seed=0, video=False, method="seppo")

    def of(memory):
        return made_of(source, "x", with_vae_memory(open_model(str(sd)), memory), data, 0, False, False)

    assert of(PLAIN) == of(SLICING) != of(TILING)
    assert "vae_tiling" not in json.dumps(of(PLAIN)), "caches of earlier versions stay good"


def test_a_vae_without_whole_tiles_is_refused(tmp_path):
    """Of 12 pixels, 6 latents, the tiles would be 4.5 latents apart."""
    file = configure(tiny_sd(tmp_path / "sd"), sample_size=12)
    model = open_model(str(tmp_path / "sd"))
    with pytest.raises(UserError, match=f"seppo.model.vae_tiling: {file}: sample_size is 12, of which no tiles .*; leave it out"):
        with_vae_memory(model, TILING)
    with_vae_memory(model, SLICING)


def test_a_vae_that_has_none_is_refused(sd, monkeypatch):
    model = open_model(str(sd))
    monkeypatch.setattr(type(model), "empty_vae", lambda self: torch.nn.Linear(1, 1))
    for memory, name in ((TILING, "tiling"), (SLICING, "slicing")):
        with pytest.raises(UserError, match=f"seppo.model.vae_{name}: the Linear of .* has no {name}; leave it out"):
            with_vae_memory(model, memory)
