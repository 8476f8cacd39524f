"""A reference whose weights stay in host memory: what it draws, what a pool writes into it, and what is on the device.

Without a GPU, `own_memory` stands for the device's: copies in place of transfers, and host memory that is not pinned.
"""

from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from networks import NETWORKS, WIDTH, denoise, given, made
from torch import nn

from seppo_fast.config import Sampler as Settings
from seppo_fast.meter import Meter
from seppo_fast.reference import Pool, Sampler, solver_table
from seppo_fast.reference.blocks import bytes_on_device, offload_blocks, offloads_blocks
from seppo_fast.reference.guidance import classifier_free
from seppo_fast.reference.network import Reference
from seppo_fast.training.noise import noise_process
from seppo_fast.training.objective import Objective, Pairs

SCHEDULE = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
EMPTY = {"prompt_embeds": torch.zeros(1, 7, WIDTH)}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def sampler(network: nn.Module, device: torch.device = CPU, autocast: torch.dtype | None = None, **settings: Any) -> Sampler:
    settings = Settings(**{"guidance_scale": 2.0, "batch_size": 2, "steps": 2, "solver": "euler"} | settings)
    empty = {name: value.to(device) for name, value in EMPTY.items()}
    return Sampler(network, denoise, solver_table(SCHEDULE, "euler", 2).to(device), empty,
                   classifier_free(settings.guidance_scale, empty), settings, torch.float32, autocast, say=lambda line: None)


def pool_of(folder: Path, name: str, policies: int = 3, **changes: int) -> Pool:
    pool = Pool(folder, torch.float32, 10**8)
    for index in range(policies):
        pool.add(index, dict(made(name, index, **changes).named_parameters()), write=True)
    return pool


@pytest.fixture
def own_memory(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device for `offload_blocks`, whose memory is the CPU's, and whose streams finish at once."""
    @contextmanager
    def kept(group: ModuleGroup) -> Any:
        yield group.cpu_param_dict

    stream = SimpleNamespace(synchronize=lambda: None)
    backend = SimpleNamespace(Stream=lambda: stream, stream=lambda _: nullcontext(), current_stream=lambda: stream)
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda device: backend)
    monkeypatch.setattr(group_offloading, "send_to_device", lambda value, *_, **__: value)
    monkeypatch.setattr(ModuleGroup, "_to_cpu", staticmethod(lambda tensor, _: tensor.detach().clone()))
    monkeypatch.setattr(ModuleGroup, "_pinned_memory_tensors", kept)
    monkeypatch.setattr(ModuleGroup, "_transfer_tensor_to_device",
                        lambda group, tensor, source, _: setattr(tensor, "data", source.detach().clone()))
    return CUDA


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_are_those_of_the_whole_network_after_each_swap(name: str, tmp_path: Path) -> None:
    whole, parts, pool = made(name), made(name), pool_of(tmp_path, name)
    offload_blocks(parts, CPU)
    assert offloads_blocks(parts) and not offloads_blocks(whole)
    references = [Reference(one, one, 2, pool, offloaded=False) for one in map(sampler, (whole, parts))]
    drawn = []
    for index in (2, 0, 1, 0):
        for reference in references:
            reference.take(index)
            with reference.drawing(None):
                drawn.append(reference.sampler.draw(*given()))
        assert torch.equal(*drawn[-2:])
    assert not torch.equal(drawn[0], drawn[-1]) and torch.equal(drawn[2], drawn[-1])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_device_of_its_own_reads_what_the_pool_writes(name: str, own_memory: torch.device, tmp_path: Path) -> None:
    """The first call records the order of the blocks, the later ones copy ahead."""
    whole, parts, pool = made(name), made(name), pool_of(tmp_path, name)
    offload_blocks(parts, own_memory)
    first, second = sampler(whole), sampler(parts)
    for index in (2, 0, 1):
        pool.load_into(index, whole)
        pool.load_into(index, parts)
        assert torch.equal(first.draw(*given()), second.draw(*given()))
        assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), parts.parameters(), strict=True))
    reference = Reference(second, second, 2, pool, offloaded=False)
    with reference.holding(dict(made(name, 7).named_parameters())):
        assert torch.equal(reference.sampler.draw(*given()), sampler(made(name, 7)).draw(*given()))


@pytest.mark.parametrize("calls", [0, 2])
def test_weights_that_are_swapped_after_a_failed_call_are_not_lost(calls: int, own_memory: torch.device, tmp_path: Path) -> None:
    """As where "auto" tries a batch that does not fit: a block is on the device then, and the next one."""
    parts, pool = made("wan"), pool_of(tmp_path, "wan")
    offload_blocks(parts, own_memory)
    drawing = sampler(parts)
    for _ in range(calls):
        drawing.draw(*given())
    fails = parts.blocks[1].ffn.register_forward_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("too large")))
    with pytest.raises(torch.OutOfMemoryError):
        drawing.draw(*given())
    fails.remove()
    for index in (1, 2):
        pool.load_into(index, parts)
        assert torch.equal(drawing.draw(*given()), sampler(made("wan", index)).draw(*given()))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_plan_counts_what_is_on_the_device(name: str, own_memory: torch.device) -> None:
    """Weights that are much larger than what is computed with them."""
    parts = made(name, layers=6, heads=16)
    expected, whole = bytes_on_device(parts), sum(weight.nbytes for weight in parts.parameters())
    assert expected < 0.7 * whole
    offload_blocks(parts, own_memory)
    latents, conditions = given(1)
    peaks = []
    for _ in range(2):  # the first call copies none ahead
        with torch.no_grad(), Meter() as meter:
            denoise(parts, latents, torch.tensor([500.0]), conditions)
        peaks.append(meter.peak)
    assert peaks[0] < peaks[1] and peaks[1] == pytest.approx(expected, rel=0.15)


def test_casts_of_autocast_do_not_stay(own_memory: torch.device) -> None:
    """Within a batch of samples, and where errors are computed: the casts of all blocks would be half the network."""
    parts = made("wan", layers=6, heads=16)
    expected = bytes_on_device(parts)
    offload_blocks(parts, own_memory)
    drawing = sampler(parts, autocast=torch.bfloat16)
    objective = Objective(denoise, noise_process(SCHEDULE, None, 1.0), "none", torch.float32, torch.bfloat16)
    latents, conditions = given(1)
    pairs = Pairs(latents.expand(2, -1, -1, -1), latents.expand(2, -1, -1, -1), torch.tensor([500.0]), conditions)
    for run in (lambda: drawing.draw(latents, conditions), lambda: objective.score(parts, pairs)):
        run()  # the first call copies none ahead
        with Meter() as meter:
            run()
        assert expected < meter.peak < 1.25 * expected, "one block's casts at most"


@gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    """The same bits after each swap, in less memory, and without the graph that is asked for."""
    pool, sizes = pool_of(tmp_path, name, layers=6, heads=16), {}
    networks = {"whole": made(name, layers=6, heads=16).to(CUDA), "parts": made(name, layers=6, heads=16)}
    offload_blocks(networks["parts"], CUDA)
    drawing = {key: sampler(network, CUDA, cuda_graph=key == "parts") for key, network in networks.items()}
    drawn = {key: [] for key in networks}
    for key, network in networks.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for index in (2, 0, 1, 0):
            pool.load_into(index, network)
            drawn[key].append(drawing[key].draw(*given(2, "cuda")).cpu())
        sizes[key] = torch.cuda.max_memory_allocated() - before
    assert all(map(torch.equal, *drawn.values())) and not torch.equal(drawn["parts"][0], drawn["parts"][1])
    assert all(weight.device.type == "cpu" for weight in networks["parts"].parameters())
    whole = sum(weight.nbytes for weight in networks["whole"].parameters())
    assert sizes["parts"] < sizes["whole"] + bytes_on_device(networks["parts"]) * 1.1 < sizes["whole"] + whole
