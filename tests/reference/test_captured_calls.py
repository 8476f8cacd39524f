"""Several captured steps a shape, one for each kind of call: what a graph forbids, and failures; on the device with a GPU."""

import gc
import weakref
from functools import partial

import pytest
import torch
from captures import (
    SCHEDULE,
    UNCONDITIONAL,
    Denoise,
    OnTheHost,
    captured,
    close,
    given,
    gpu,
    network,
)
from torch import nn

from seppo_fast.config import Sampler as Settings
from seppo_fast.reference import Pool, Sampler, classifier_free, sample, solver_table
from seppo_fast.reference import sampler as module
from seppo_fast.reference.adapter import Beside
from seppo_fast.reference.calls import calls_of
from seppo_fast.reference.loop import open_loop

LIMITS = [{"guidance_interval": [0.3, 0.9]}, {"guidance_interval": [0.0, 0.5]}, {"unconditional_every": 2},
          {"guidance_interval": [0.0, 0.9], "unconditional_every": 3}]
limits = pytest.mark.parametrize("limits", LIMITS, ids=str)


def adapter(unet, seed=3):
    """A LoRA beside each query projection."""
    random, changes = torch.Generator().manual_seed(seed), []
    for name, layer in unet.named_modules():
        if name.endswith("to_q"):
            down, up = (nn.Linear(into, out, bias=False) for into, out in ((layer.in_features, 2), (2, layer.out_features)))
            for side in (down, up):
                side.weight.data = torch.randn(side.weight.shape, generator=random)
                side.to(layer.weight).requires_grad_(False)
            changes.append((layer, "forward", Beside(layer.forward, down, up, 0.5)))
    return changes


@pytest.mark.parametrize("limits", LIMITS[1::2], ids=str)
def test_no_step_leaves_the_device(limits):
    """On "meta", where a value has no place: each kind of call, and what is kept between them."""
    settings = Settings(guidance_scale=2.5, **limits)
    table = solver_table(SCHEDULE, "ddim", 5)
    with torch.device("meta"):
        unet, empty = network(device="meta"), {"prompt_embeds": torch.empty(1, 5, 12)}
        loop = open_loop(partial(Denoise(), unet), table.to("meta"), (3, 4, 8, 8), empty,
                         classifier_free(2.5, empty), torch.float32, calls_of(table.levels, 2, settings))
    assert len({*loop.calls}) > 1 and (loop.kept is not None) == ("kept" in loop.calls)
    with torch.no_grad(), OnTheHost() as seen:
        for call in {*loop.calls}:
            loop.step(call)
    assert seen.names == []


class Graph:
    """What a capture returns."""

    def replay(self):
        raise AssertionError("a capture failed, and its sampler replays")


def test_a_second_capture_that_fails_leaves_nothing_of_the_first(monkeypatch):
    """The larger batch is captured first: what it leaves free is enough for the others."""
    rows, graphs = [], []

    def capture(warm_up, step, device, pool):
        warm_up()
        if graphs:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        graph = Graph()
        graphs.append(weakref.ref(graph))
        return graph, 0.1

    def denoise(unet, latents, t, conditions):
        rows.append(len(latents))
        return Denoise()(unet, latents, t, conditions)

    monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(module, "new_pool", lambda device: object())
    settings = Settings(guidance_scale=2.5, guidance_interval=[0.0, 0.7], batch_size=4)
    table, unet = solver_table(SCHEDULE, "ddim", 5), network()
    plain, drawer = (Sampler(unet, denoise, table, UNCONDITIONAL, classifier_free(2.5, UNCONDITIONAL), settings, torch.float32)
                     for _ in range(2))
    assert drawer.calls[0] == "prompt"
    noise, conditions = torch.randn(4, 4, 8, 8), {"prompt_embeds": torch.randn(4, 5, 12)}
    want = plain.draw(noise, conditions)
    rows.clear()
    drawer._capture = True  # as on a GPU
    with pytest.warns(RuntimeWarning, match="seppo.sampler.cuda_graph"):
        got = drawer.draw(noise, conditions)
    assert torch.equal(got, want) and rows[:2] == [8, 4], "guided and unguided"
    gc.collect()
    assert graphs[0]() is None and drawer._pool is None and not drawer._capture


def plainly(unet, noise, conditions, limits, adapted=(), solver="ddim"):
    """The loop as it is, on the device."""
    settings = Settings(guidance_scale=2.5, **limits)
    table = solver_table(SCHEDULE, solver, 5).to("cuda")
    with module.tuning.changed([*adapted]):
        return sample(lambda *args: Denoise()(unet, *args), table, noise, conditions, UNCONDITIONAL,
                      classifier_free(2.5, UNCONDITIONAL), torch.float32, calls=calls_of(table.levels, 2, settings))


@gpu
@limits
def test_captured_calls_equal_the_plain_loop(limits):
    unet, denoise = network(device="cuda"), Denoise()
    noise, conditions = given(6)
    drawing = captured(unet, denoise, **limits)
    drawing.draw(noise[:4], conditions={name: value[:4] for name, value in conditions.items()})
    made = denoise.calls
    close(drawing.draw(noise, conditions), plainly(unet, noise, conditions, limits))
    again = drawing.draw(noise, conditions)
    assert denoise.calls == made, "later batches are replayed"
    assert torch.equal(drawing.draw(noise, conditions), again)
    (ready,) = drawing._ready.values()
    assert ready.graphs.keys() == {*drawing.calls}


@gpu
def test_the_smaller_graph_uses_the_larger_ones_memory():
    unet = network(device="cuda")
    noise, conditions = given(4)
    reserved = []
    for limits in ({}, {"guidance_interval": [0.0, 0.7]}):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        drawing = captured(unet, Denoise(), **limits)
        drawing.draw(noise, conditions)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved() - before)
        drawing.release()
    assert reserved[1] < 1.3 * reserved[0] + 2**21


@gpu
def test_an_adapter_is_captured_and_policies_are_swapped_beneath_it(tmp_path):
    unet = network(device="cuda")
    noise, conditions = given(4)
    adapted, denoise = adapter(unet), Denoise()
    settings = Settings(guidance_scale=2.5, batch_size=4)
    drawing = Sampler(unet, denoise, solver_table(SCHEDULE, "ddim", 5).to("cuda"), UNCONDITIONAL,
                      classifier_free(2.5, UNCONDITIONAL), settings, torch.float32, None, lambda text: None, adapted)
    close(drawing.draw(noise, conditions), plainly(unet, noise, conditions, {}, adapted))
    assert (drawing.draw(noise, conditions) - plainly(unet, noise, conditions, {})).abs().max() > 0.01
    made, pool = denoise.calls, Pool(tmp_path, torch.float32, 10**6)
    pool.add(1, dict(network(1).named_parameters()), write=True)
    pool.load_into(1, unet)
    close(drawing.draw(noise, conditions), plainly(unet, noise, conditions, {}, adapted))
    assert denoise.calls == made, "nothing was captured anew"


@gpu
def test_a_second_capture_that_fails_on_the_device_falls_back():
    unet = network(device="cuda")
    noise, conditions = given(4)
    limits = {"guidance_interval": [0.0, 0.7]}

    def fails_without_guidance(unet, latents, t, conditions):
        if len(latents) == 4:
            latents.mean().item()
        return Denoise()(unet, latents, t, conditions)

    drawing = captured(unet, fails_without_guidance, **limits)
    with pytest.warns(RuntimeWarning, match="seppo.sampler.cuda_graph"):
        close(drawing.draw(noise, conditions), plainly(unet, noise, conditions, limits))
    close(drawing.draw(noise, conditions), plainly(unet, noise, conditions, limits))
    later = captured(unet, Denoise(), **limits)
    close(later.draw(noise, conditions), plainly(unet, noise, conditions, limits))
