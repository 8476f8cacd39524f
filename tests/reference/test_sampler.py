"""The sampler: any number of samples, compiled or not, fused or not, and nobody else sees what it does to the network."""

import re
import warnings
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0

from seppo_fast.config import Lora
from seppo_fast.config import Sampler as Settings
from seppo_fast.errors import UserError
from seppo_fast.models.lora import add_lora
from seppo_fast.reference import Pool, Sampler, classifier_free, sample, solver_table

SCHEDULE = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
            "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1}
TABLE = solver_table(SCHEDULE, "ddim", 3)


def network(seed=0):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval()


class Counting:
    """A denoiser that keeps the number of rows of each call and the dtype that it computed in."""

    def __init__(self):
        self.rows, self.dtypes = [], []

    def __call__(self, unet, latents, t, conditions):
        out = unet(latents, t, encoder_hidden_states=conditions["prompt_embeds"], return_dict=False)[0]
        self.rows.append(len(latents))
        self.dtypes.append(out.dtype)
        return out


def denoise(unet, latents, t, conditions):
    return unet(latents, t, encoder_hidden_states=conditions["prompt_embeds"], return_dict=False)[0]


UNCONDITIONAL = {"prompt_embeds": torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(7))}


def given(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 8, 8, generator=g), {"prompt_embeds": 3 * torch.randn(count, 5, 12, generator=g)}


def sampler(unet, denoise=denoise, autocast=None, say=lambda text: None, **settings):
    settings = Settings(**{"steps": 3, "guidance_scale": 2.5, "batch_size": 4} | settings)
    branches = classifier_free(settings.guidance_scale, UNCONDITIONAL)
    return Sampler(unet, denoise, TABLE, UNCONDITIONAL, branches, settings, torch.float32, autocast, say)


def expected(unet, noise, conditions, guidance=2.5):
    return sample(lambda *given: denoise(unet, *given), TABLE, noise, conditions, UNCONDITIONAL,
                  classifier_free(guidance, UNCONDITIONAL), torch.float32)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count,size,rows", [(1, 4, [1]), (4, 4, [4]), (5, 4, [3, 2]), (9, 4, [3, 3, 3]), (2, 64, [2])])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_any_number_in_even_batches_and_nothing_is_wasted(count, size, rows, guidance):
    unet, counting = network(), Counting()
    noise, conditions = given(count)
    got = sampler(unet, counting, batch_size=size, guidance_scale=guidance).draw(noise, conditions)
    assert got.shape == noise.shape and got.dtype == torch.float32
    close(got, expected(unet, noise, conditions, guidance))
    assert counting.rows == [n * (1 if guidance == 1 else 2) for n in rows for _ in range(3)]


def test_its_precision_is_its_own():
    unet, counting = network(), Counting()
    noise, conditions = given(2)
    plain = sampler(unet, counting).draw(noise, conditions)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sampler(unet, counting).draw(noise, conditions), plain)
    half = sampler(unet, counting, autocast=torch.bfloat16).draw(noise, conditions)
    assert counting.dtypes == [torch.float32] * 6 + [torch.bfloat16] * 3
    assert 1e-4 < (half - plain).abs().max() < 0.5


def test_giving_up_in_the_middle():
    unet, calls = network(), []
    noise, conditions = given(8)

    def before_step():
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt

    drawing = sampler(unet, fuse_projections=True)
    with pytest.raises(KeyboardInterrupt):
        drawing.draw(noise, conditions, before_step)
    assert len(calls) == 5
    assert {type(part) for part in unet.attn_processors.values()} == {AttnProcessor2_0}
    close(drawing.draw(noise, conditions), expected(unet, noise, conditions))


def test_conditions_must_be_those_of_the_empty_prompt():
    noise, conditions = given(2)
    with pytest.raises(ValueError, match="conditions are .*pooled.*, the unconditional ones .'prompt_embeds'"):
        sampler(network()).draw(noise, conditions | {"pooled": torch.zeros(2, 3)})


# compile


@pytest.mark.slow
def test_compiled_blocks_are_the_loops_alone():
    """One compilation for all blocks and batches; padded when ragged; a NaN stays in its batch; a changed model is noticed."""
    torch.compiler.reset()  # what other tests compiled would do
    unet, counting, said = network(), Counting(), []
    noise, conditions = given(3)
    with torch.no_grad():
        alone = denoise(unet, noise, torch.tensor([5]), conditions)
    want = expected(unet, noise, conditions)
    drawing = sampler(unet, counting, compile="regional", batch_size=2, say=said.append)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert drawing.draw(noise * torch.nan, conditions).isnan().all()
        close(drawing.draw(noise, conditions), want)
        close(drawing.draw(noise[2:], {"prompt_embeds": conditions["prompt_embeds"][2:]}), want[2:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    assert set(counting.rows) == {4}, "one shape: two samples and their guidance"
    assert len(said) == 1
    assert re.fullmatch(r"sampler: compile \d+\.\d s \([01] of 1 graphs from the cache\), for batches of 2", said[0])
    with torch.no_grad():
        assert torch.equal(denoise(unet, noise, torch.tensor([5]), conditions), alone), "the training step sees no compiled block"

    unet.load_state_dict(network(1).state_dict(), assign=True)
    close(drawing.draw(noise, conditions), expected(network(1), noise, conditions))
    assert "preparing it anew" in said[1]
    drawing.release()
    close(drawing.draw(noise, conditions), expected(network(1), noise, conditions))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1, "the compiled code is used again"


@pytest.mark.slow
def test_every_shape_is_compiled(monkeypatch):
    """More of them than PyTorch would compile of one function, after which it runs the rest as it is."""
    torch.compiler.reset()  # what other tests compiled would count
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):  # PyTorch's own is 8
        drawing = sampler(network(), compile="regional")
        for size in range(1, 5):
            drawing.batch_size = size
            drawing.draw(*given(size))


class Small(torch.nn.Module):
    """A network that compiles in a second."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, latents, t, encoder_hidden_states, return_dict):
        return (self.layer(latents) + encoder_hidden_states.mean((1, 2))[:, None, None, None] + t.view(-1, 1, 1, 1) / 1000,)


def test_the_whole_network_compiled():
    net, said = Small(), []
    noise, conditions = given(5)
    drawing = sampler(net, compile="full", say=said.append)
    close(drawing.draw(noise, conditions), expected(net, noise, conditions))
    with torch.no_grad():
        net.layer.weight.mul_(2)
    close(drawing.draw(noise, conditions), expected(net, noise, conditions))
    assert len(said) == 1


@pytest.mark.parametrize("how", ["regional", "full"])
def test_a_compiler_that_fails_leaves_the_plain_loop(how, quick_compiler):
    torch.compiler.reset()  # what other tests compiled would do
    unet, said = Small() if how == "full" else network(), []
    noise, conditions = given(5)
    drawing = sampler(unet, compile=how, say=said.append)
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/compiler",), "force_disable_caches": True}):
        with pytest.warns(RuntimeWarning, match="seppo.sampler.compile does not work here, and the run goes on without it"):
            got = drawing.draw(noise, conditions)
    close(got, expected(unet, noise, conditions))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        close(drawing.draw(noise, conditions), expected(unet, noise, conditions))
    assert said == []


def test_nothing_to_compile():
    with pytest.raises(UserError, match='seppo.sampler.compile: this model has no transformer blocks.*"full" or "none"'):
        sampler(torch.nn.Linear(1, 1), compile="regional")


# fused projections


def test_fused_projections_follow_the_weights(tmp_path, monkeypatch):
    unet, other = network(0), network(1)
    noise, conditions = given(3)
    pool = Pool(tmp_path, torch.float32, 10**9)
    for index, module in enumerate((unet, other)):
        pool.add(index, dict(module.named_parameters()), write=True)
    drawing = sampler(unet, fuse_projections=True)
    calls, plain = [], FusedAttnProcessor2_0.__call__
    monkeypatch.setattr(FusedAttnProcessor2_0, "__call__", lambda *args, **kwargs: calls.append(None) or plain(*args, **kwargs))
    close(drawing.draw(noise, conditions), expected(network(0), noise, conditions))
    assert len(calls) == 3 * 8, "the fused projection is what is used"
    pool.load_into(1, unet)
    close(drawing.draw(noise, conditions), expected(other, noise, conditions))
    pool.load_into(0, unet)
    with torch.no_grad():
        assert torch.equal(denoise(unet, noise, torch.tensor([5]), conditions),
                           denoise(network(0), noise, torch.tensor([5]), conditions)), "the training step sees the plain network"
    assert len(calls) == 2 * 3 * 8


def test_fused_projections_refuse():
    unet = network()
    add_lora(unet, Lora(rank=2), seed=0)
    with pytest.raises(UserError, match="seppo.sampler.fuse_projections: does not go with seppo.model.lora"):
        sampler(unet, fuse_projections=True)
    unet = network()
    unet.set_attn_processor(AttnProcessor())
    with pytest.raises(UserError, match='needs seppo.model.attention "sdpa", this model\'s attention is AttnProcessor'):
        sampler(unet, fuse_projections=True)


# batch size


@pytest.mark.parametrize("free,wanted", [(10**12, 5), (10**12, 1), (1, 64)])
def test_batch_size_is_found(free, wanted):
    unet, said = network(), []
    noise, conditions = given(5)
    drawing = sampler(unet, batch_size="auto", say=said.append)
    assert drawing.batch_size is None
    drawing.fit(noise.shape[1:], wanted, free=lambda device: free)
    assert 1 <= drawing.batch_size <= (1 if free == 1 else wanted)
    assert len(said) == 1 and said[0].startswith(f"sampler: batches of {drawing.batch_size}: ")
    if free == 1:
        assert "2 need more than 50% of the free memory" in said[0]
    close(drawing.draw(noise, conditions), expected(unet, noise, conditions))


@pytest.mark.slow
def test_batch_size_of_several_ranks_and_at_first_use():
    noise, conditions = given(3)
    drawing, said = sampler(network(), batch_size="auto", say=(said := []).append), said
    drawing.fit(noise.shape[1:], 3, agree=lambda size: 7)
    assert drawing.batch_size == 7 and "batches of 7, as all ranks agreed; " in said[0]
    drawing = sampler(network(), batch_size="auto")
    close(drawing.draw(noise, conditions), expected(network(), noise, conditions))
    assert 1 <= drawing.batch_size <= 3
    fixed = sampler(network(), batch_size=2)
    fixed.fit(noise.shape[1:], 3)
    assert fixed.batch_size == 2


def refused(most, message):
    """A denoiser whose kernels fail for more than `most` rows."""
    def denoised(unet, latents, t, conditions):
        if len(latents) > most:
            raise torch.AcceleratorError(f"CUDA error: {message}\nCompile with TORCH_USE_CUDA_DSA")
        return denoise(unet, latents, t, conditions)

    return denoised


def test_batch_size_that_cannot_be_launched_is_too_large():
    said = []
    drawing = sampler(network(), refused(2, "invalid configuration argument"), say=said.append, batch_size="auto")
    drawing.fit((4, 8, 8), 5, free=lambda device: 10**12)
    assert drawing.batch_size == 1
    assert said == ["sampler: batches of 1: 2 are more than a kernel can be launched for"
                    " (AcceleratorError: CUDA error: invalid configuration argument)"]


@pytest.mark.parametrize("most,message", [(0, "invalid configuration argument"), (2, "an illegal memory access was encountered")])
def test_what_no_smaller_batch_mends_is_raised(most, message):
    """Nothing fits, or the device is lost to this process."""
    with pytest.raises(RuntimeError, match=message):
        sampler(network(), refused(most, message), batch_size="auto").fit((4, 8, 8), 5, free=lambda device: 10**12)
