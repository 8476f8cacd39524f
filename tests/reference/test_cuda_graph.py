"""When a captured step is stale (everywhere), and that a captured sampler draws what a plain one does (with a GPU)."""

import threading
import warnings

import pytest
import torch
from captures import SCHEDULE, UNCONDITIONAL, Denoise, captured, close, expected, given, gpu, network
from diffusers import MotionAdapter, UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from seppo_fast.config import Lora
from seppo_fast.models.lora import add_lora
from seppo_fast.reference import Pool, classifier_free, sample, solver_table
from seppo_fast.reference.cuda_graph import fingerprint


def with_lora():
    unet = network()
    add_lora(unet, Lora(rank=2), seed=0)
    return unet


# What makes a capture stale


@torch.no_grad()
def call(unet):
    return unet(torch.zeros(1, 4, 8, 8), torch.tensor([3]), encoder_hidden_states=torch.zeros(1, 5, 12)).sample


def in_place(unet):
    with torch.no_grad():
        torch._foreach_copy_(list(unet.parameters()), list(network(1).parameters()))


@pytest.mark.parametrize("change", [call, in_place, lambda unet: unet.load_state_dict(network(1).state_dict()),
                                    lambda unet: unet.eval(), lambda unet: unet.train().eval()])
def test_new_values_are_no_change(change):
    unet = network()
    before = fingerprint(unet)
    change(unet)
    assert fingerprint(unet) == before


def materialised_anew(unet):
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()


def loaded_plainly_after_assign(unet):
    """A state that was once loaded with assign=True makes a later plain load re-point the parameters."""
    state = network(1).state_dict()
    network(2).load_state_dict(state, assign=True)
    unet.load_state_dict(state)


CHANGES = {
    "assign": lambda unet: unet.load_state_dict(network(1).state_dict(), assign=True),
    "assign before": loaded_plainly_after_assign,
    "materialised": materialised_anew,
    "one parameter": lambda unet: setattr(unet.conv_in, "bias", torch.nn.Parameter(unet.conv_in.bias.detach().clone())),
    "layout": lambda unet: unet.to(memory_format=torch.channels_last),
    "dtype": lambda unet: unet.double(),
    "mode": lambda unet: unet.train(),
    "processor's class": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "processor": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "a constant": lambda unet: setattr(unet.down_blocks[0].resnets[0], "output_scale_factor", 2.0),
    "hook": lambda unet: unet.mid_block.register_forward_hook(lambda *_: None),
    "layer": lambda unet: setattr(unet, "conv_act", torch.nn.ReLU()),
    "adapter": lambda unet: add_lora(unet, Lora(rank=2), seed=0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_other_change_is_one(change):
    unet = network()
    before = fingerprint(unet)
    change(unet)
    assert fingerprint(unet) != before


@pytest.mark.parametrize("change", [lambda unet: unet.disable_adapters(), lambda unet: unet.set_adapters("default", weights=0.5),
                                    lambda unet: unet.fuse_lora(), lambda unet: unet.delete_adapters("default")])
def test_adapters_are_part_of_it(change):
    unet = with_lora()
    before = fingerprint(unet)
    assert fingerprint(unet) == before
    change(unet)
    assert fingerprint(unet) != before


def test_an_object_at_the_address_of_a_dead_one_is_another():
    unet = network()
    seen = [fingerprint(unet)]
    for _ in range(20):
        unet.set_attn_processor(AttnProcessor2_0())
        assert fingerprint(unet) not in seen
        seen.append(fingerprint(unet))


# On a GPU


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="seppo")
        yield


@gpu
@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++", "pndm", "unipc", "euler"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_replay_equals_the_plain_loop(solver, guidance):
    unet, denoise = network(device="cuda"), Denoise()
    drawing = captured(unet, denoise, solver, guidance_scale=guidance)
    drawing.draw(*given(4))
    calls = denoise.calls
    for seed in range(3):
        noise, conditions = given(4, seed)
        close(drawing.draw(noise, conditions), expected(unet, noise, conditions, guidance, solver))
    assert denoise.calls == calls, "nothing but replays after the capture"


@gpu
def test_ragged_batches_are_padded_and_other_shapes_captured():
    unet, denoise = network(device="cuda"), Denoise()
    drawing = captured(unet, denoise)
    noise, conditions = given(4)
    drawing.draw(noise, conditions)
    calls = denoise.calls
    for count in (1, 3, 7, 11):
        noise, conditions = given(count, seed=count)
        got = drawing.draw(noise, conditions)
        assert got.shape == noise.shape
        close(got, expected(unet, noise, conditions))
    assert denoise.calls == calls
    wide = noise.repeat(1, 1, 2, 1)
    close(drawing.draw(wide, conditions), expected(unet, wide, conditions))
    assert denoise.calls > calls
    close(drawing.draw(noise, conditions), expected(unet, noise, conditions))


@gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("host", [0, 10**9])
def test_a_swap_gives_the_new_models_samples(tmp_path, host, autocast):
    unet, others, denoise = network(device="cuda"), [network(seed, "cuda") for seed in range(3)], Denoise()
    pool = Pool(tmp_path, torch.float32, host)
    for index, other in enumerate(others):
        pool.add(index, dict(other.named_parameters()), write=True)
    drawing = captured(unet, denoise, autocast=autocast)
    noise, conditions = given(4)
    drawing.draw(noise, conditions)
    calls = denoise.calls
    for index in (1, 0, 2, 1):
        pool.load_into(index, unet)
        close(drawing.draw(noise, conditions), expected(others[index], noise, conditions, autocast=autocast),
              0.1 if autocast else 1e-3)
        assert pool.last_swap.bytes == sum(p.nbytes for p in unet.parameters()) and pool.last_swap.seconds > 0
    assert denoise.calls == calls
    assert (expected(others[0], noise, conditions) - expected(others[1], noise, conditions)).abs().max() > 0.3


@gpu
@pytest.mark.parametrize("change", ["assign", "assign before", "materialised", "one parameter", "layout", "processor's class",
                                    "a constant", "layer"])
def test_a_stale_graph_is_never_replayed(change):
    unet, said, denoise = network(device="cuda"), [], Denoise()
    drawing = captured(unet, denoise, say=said.append)
    noise, conditions = given(4)
    drawing.draw(noise, conditions)
    CHANGES[change](unet)
    unet.to("cuda")  # the states above are the CPU's
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.1)
    close(drawing.draw(noise, conditions), expected(unet, noise, conditions))
    assert sum("preparing it anew" in line for line in said) == 1 and sum("capture" in line for line in said) == 2
    calls = denoise.calls
    close(drawing.draw(noise, conditions), expected(unet, noise, conditions))
    assert denoise.calls == calls


@gpu
def test_a_batch_of_nan_leaves_no_trace():
    unet = network(device="cuda")
    drawing = captured(unet, Denoise())
    noise, conditions = given(4)
    assert drawing.draw(noise * torch.nan, {"prompt_embeds": conditions["prompt_embeds"] * torch.nan}).isnan().all()
    close(drawing.draw(noise, conditions), expected(unet, noise, conditions))


@gpu
def test_the_host_never_waits():
    unet, steps = network(device="cuda"), []
    drawing = captured(unet, Denoise())
    noise, conditions = given(7)
    drawing.draw(noise, conditions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = drawing.draw(noise, conditions, lambda: steps.append(None))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close(got, expected(unet, noise, conditions))
    assert len(steps) == 10


@gpu
@pytest.mark.parametrize("settings", [{"compile": "regional"}, {"compile": "full"}, {"fuse_projections": True},
                                      {"compile": "regional", "fuse_projections": True}])
def test_compiled_and_fused_and_captured(tmp_path, settings):
    unet, other, denoise = network(device="cuda"), network(1, "cuda"), Denoise()
    pool = Pool(tmp_path, torch.float32, 10**9)
    pool.add(0, dict(other.named_parameters()), write=True)
    drawing = captured(unet, denoise, **settings)
    noise, conditions = given(4)
    close(drawing.draw(noise, conditions), expected(unet, noise, conditions))
    calls = denoise.calls
    pool.load_into(0, unet)
    close(drawing.draw(noise, conditions), expected(other, noise, conditions))
    assert denoise.calls == calls


@gpu
def test_adapters_are_captured():
    unet, denoise = with_lora().to("cuda"), Denoise()
    drawing = captured(unet, denoise)
    noise, conditions = given(4)
    drawing.draw(noise, conditions)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    close(drawing.draw(noise, conditions), expected(unet, noise, conditions))
    unet.disable_adapters()
    close(drawing.draw(noise, conditions), expected(network(device="cuda"), noise, conditions))


@gpu
@pytest.mark.parametrize("settings", [{}, {"compile": "regional"}])
def test_videos_are_captured_and_their_adapters_swapped(tmp_path, settings):
    """5-D latents through motion modules with a LoRA: replays follow the adapter that lies in the network's storage."""
    torch.manual_seed(0)
    adapter = MotionAdapter(block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4,
                            motion_num_attention_heads=2, motion_max_seq_length=8)
    unet = UNetMotionModel.from_unet2d(network(), adapter).eval()
    add_lora(unet, Lora(rank=2), seed=0)
    unet.to("cuda")
    weights = {name: weight.detach().clone() for name, weight in unet.named_parameters() if weight.requires_grad}
    pool = Pool(tmp_path, torch.float32, 10**9)
    for index in range(2):
        pool.add(index, {name: weight + index * torch.randn_like(weight) for name, weight in weights.items()}, write=True)
    calls = []

    def denoise(module, latents, t, conditions):
        calls.append(None)
        prompts = conditions["prompt_embeds"].repeat_interleave(latents.shape[2], dim=0)
        return module(latents, t, encoder_hidden_states=prompts, return_dict=False)[0]

    drawing, (_, conditions) = captured(unet, denoise, **settings), given(4)
    noise = torch.randn(4, 4, 6, 8, 8, generator=torch.Generator().manual_seed(1)).cuda()
    drawing.draw(noise, conditions)
    before, seen = len(calls), []
    for index in (1, 0, 1):
        pool.load_into(index, unet)
        seen.append(drawing.draw(noise, conditions))
        assert len(calls) == before, "nothing but replays"
        table = solver_table(SCHEDULE, "ddim", 5).to("cuda")
        plain = sample(lambda *args: denoise(unet, *args), table, noise, conditions, UNCONDITIONAL,
                       classifier_free(2.5, UNCONDITIONAL), torch.float32)
        close(seen[-1], plain)
        before = len(calls)
    assert (seen[0] - seen[1]).abs().max() > 0.01 and torch.equal(seen[0], seen[2])


@gpu
def test_what_cannot_be_captured_runs_as_it_is():
    unet = network(device="cuda")
    noise, conditions = given(4)

    def reads_a_value(unet, latents, t, conditions):
        assert latents.float().mean().item() < 1e9
        return Denoise()(unet, latents, t, conditions)

    drawing = captured(unet, reads_a_value)
    with pytest.warns(RuntimeWarning, match="seppo.sampler.cuda_graph does not work here, and the run goes on without it"):
        got = drawing.draw(noise, conditions)
    close(got, expected(unet, noise, conditions))
    close(drawing.draw(noise, conditions), expected(unet, noise, conditions))
    close(captured(unet, Denoise()).draw(noise, conditions), expected(unet, noise, conditions))  # no harm to the next


@gpu
def test_graphs_of_before_a_failure_are_not_kept():
    unet = network(device="cuda")
    noise, conditions = given(4)

    def reads_a_value_of_wide_latents(unet, latents, t, conditions):
        assert latents.shape[2] == 8 or latents.float().mean().item() < 1e9
        return Denoise()(unet, latents, t, conditions)

    drawing = captured(unet, reads_a_value_of_wide_latents)
    drawing.draw(noise, conditions)
    with pytest.warns(RuntimeWarning, match="seppo.sampler.cuda_graph"):
        drawing.draw(noise.repeat(1, 1, 2, 1), conditions)
    unet.load_state_dict(network(1, "cuda").state_dict(), assign=True)
    close(drawing.draw(noise, conditions), expected(unet, noise, conditions))


@gpu
def test_released_graphs_give_their_memory_back():
    unet, denoise = network(device="cuda"), Denoise()
    drawing = captured(unet, denoise)
    noise, conditions = given(4)
    want, calls = drawing.draw(noise, conditions), denoise.calls
    drawing.release()
    before = torch.cuda.memory_reserved()  # with what the libraries keep
    close(drawing.draw(noise, conditions), want)
    assert denoise.calls == 2 * calls and torch.cuda.memory_reserved() > before
    drawing.release()
    assert torch.cuda.memory_reserved() <= before + 2**21  # the smallest that the allocator asks for


@gpu
def test_a_thread_may_copy_to_the_device_meanwhile():
    unet, stop, copies = network(device="cuda"), threading.Event(), []

    def copy():
        while not stop.is_set():
            copies.append(torch.ones(1000).pin_memory().cuda(non_blocking=True).sum().item())

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        noise, conditions = given(4)
        close(captured(unet, Denoise()).draw(noise, conditions), expected(unet, noise, conditions))
    finally:
        stop.set()
        thread.join()
    assert set(copies) == {1000.0}
