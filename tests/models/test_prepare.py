"""Attention and compilation of the UNets."""

import warnings
from functools import partial

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from diffusers.utils import is_xformers_available
from tiny import unet

from seppo_fast.compiler import transformer_blocks
from seppo_fast.config import Model
from seppo_fast.errors import UserError
from seppo_fast.models import attention
from seppo_fast.models.attention import choose_attention, layers
from seppo_fast.models.launches import inner
from seppo_fast.models.prepare import prepare_denoisers
from seppo_fast.models.trial import block_inputs

CPU = torch.device("cpu")


def call(net, device="cpu", dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    latents, prompt = (torch.randn(2, *shape, generator=g).to(device, dtype) for shape in ((4, 8, 8), (7, 32)))
    return net(latents, torch.tensor([3, 9], device=device), encoder_hidden_states=prompt).sample


INPUTS = partial(block_inputs, unet, lambda net: call(net, "meta"))


def test_on_the_cpu_the_choice_is_pytorchs_own():
    for choice, why in (("auto", "xformers has kernels for GPUs only"), ("sdpa", "as configured")):
        net, said = unet(), []
        assert choose_attention([net], choice, (8, 8), torch.float32, CPU, said.append) == "sdpa"
        assert len(said) == 1 and said[0].startswith("attention: sdpa (") and why in said[0]
        assert {type(processor) for processor in net.attn_processors.values()} == {AttnProcessor2_0}


def test_xformers_that_cannot_be_had_is_refused():
    with pytest.raises(UserError, match='seppo.model.attention: "xformers" does not work here: .*GPUs only.*use "auto" or "sdpa"'):
        choose_attention([unet()], "xformers", (8, 8), torch.float32, CPU)
    if not is_xformers_available():
        with pytest.raises(UserError, match="xformers is not installed"):
            choose_attention([unet()], "xformers", (8, 8), torch.float32, torch.device("cuda"))


def test_a_rank_without_xformers_decides_for_all(monkeypatch):
    """`max` stands for the other ranks' part: what this one chose, and what one chose where xformers is missing."""
    chosen = []
    monkeypatch.setattr(attention, "_missing", lambda *given: None)
    monkeypatch.setattr(attention, "_faster", lambda *given: ("xformers", "measured"))
    without = attention.KERNELS.index("sdpa")
    assert choose_attention([unet()], "auto", (8, 8), torch.float32, CPU,
                            agree=lambda index: chosen.append(index) or max(index, without)) == "sdpa"
    assert chosen == [attention.KERNELS.index("xformers")]


def test_the_layers_that_are_measured_are_the_networks_own():
    net, seen = unet(down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2), []
    for module in net.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda layer, given: seen.append((*given[0].shape[1:], layer.heads)))
    with torch.no_grad():
        call(net)
    found = layers(net, (8, 8))
    assert sorted(seen) == sorted((layer.tokens, layer.channels, layer.heads) for layer in found.elements())
    assert {layer.prompt for layer in found} == {None, 32} and {layer.sequences for layer in found} == {1} and len(seen) > 8


@pytest.mark.skipif(not (torch.cuda.is_available() and is_xformers_available()), reason="needs a GPU and xformers")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_xformers_agrees(dtype):
    torch.manual_seed(0)
    net, said = unet(attention_head_dim=8).to("cuda", dtype), []
    want = call(net, "cuda", dtype)
    want.float().square().mean().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    assert choose_attention([net], "xformers", (8, 8), dtype, torch.device("cuda")) == "xformers"
    assert {type(inner(processor)) for processor in net.attn_processors.values()} == {XFormersAttnProcessor}
    got = call(net, "cuda", dtype)
    got.float().square().mean().backward()
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0.1, atol=0.02)
    assert choose_attention([unet(), unet()], "auto", (8, 8), dtype, torch.device("cuda"), said.append) in ("sdpa", "xformers")
    assert "measured: xformers " in said[0]


def test_compiled_blocks_train_as_before(quick_compiler):
    """In the shapes in which compilation is tried first, so that it is compiled once."""
    torch.manual_seed(0)
    make = partial(unet, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # the middle is left to compile
    net, latents, prompt = make(), torch.randn(1, 4, 4, 8), torch.randn(1, 8, 32)  # 2 x 4 places in the middle

    def run(net):
        given = (tensor.to(net.device) for tensor in (latents, torch.tensor([3]), prompt))
        return net(*given).sample

    def gradients():
        net.zero_grad()
        run(net).square().mean().backward()
        return [parameter.grad.clone() for parameter in net.parameters()]

    plain, before = gradients(), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    prepare_denoisers([net], Model(path="x", compile="regional"), (4, 8), torch.float32, CPU,
                      inputs=partial(block_inputs, make, run))
    assert all(block._compiled_call_impl is not None for block in transformer_blocks(net))
    compiled = gradients()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    for gradient, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_compiler_that_fails_leaves_the_plain_network():
    torch.compiler.reset()  # what other tests compiled would do
    net = unet()
    want = call(net)
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/compiler",), "force_disable_caches": True}):
        with pytest.warns(RuntimeWarning, match="seppo.model.compile does not work here, and the run goes on without it"):
            prepare_denoisers([net], Model(path="x", compile="regional"), (8, 8), torch.float32, CPU, inputs=INPUTS)
        assert torch.equal(call(net), want)


def test_a_frozen_network_is_compiled_as_any_other(quick_compiler):
    """The improvement model, and the image layers of a video model."""
    net = unet().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="seppo")
        prepare_denoisers([net], Model(path="x", compile="regional"), (8, 8), torch.float32, CPU, lambda line: None,
                          inputs=INPUTS)
    assert all(block._compiled_call_impl is not None for block in transformer_blocks(net))
    assert not any(weight.requires_grad for weight in net.parameters())
