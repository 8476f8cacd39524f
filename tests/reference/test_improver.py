"""The improvement model in its sampler: double guidance, weights that are swapped, and the way to host memory and back."""

import warnings

import pytest
import torch
from captures import SCHEDULE, UNCONDITIONAL, close, gpu, network

from seppo_fast.config import Sampler as Settings
from seppo_fast.models.latents import LatentScale
from seppo_fast.reference import Pool, Sampler, double, sample, solver_table
from seppo_fast.reference.improver import Improver

SCALE = 0.5  # of a VAE
EMPTY = UNCONDITIONAL | {"image_latents": torch.zeros(1, 4, 8, 8)}
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="seppo")
        yield


class Denoise:
    """A denoiser of latents beside their image that counts its calls from Python: a replay makes none."""

    def __init__(self):
        self.calls = 0

    def __call__(self, unet, latents, t, conditions):
        self.calls += 1
        return unet(torch.cat([latents, conditions["image_latents"]], 1), t, encoder_hidden_states=conditions["prompt_embeds"],
                    return_dict=False)[0]


def improver(unet, denoise, device, offloaded=True, text=3.5, image=3.0, **settings):
    sampler = Sampler(unet, denoise, solver_table(SCHEDULE, "ddim", 5).to(device), EMPTY, double(text, image, EMPTY),
                      Settings(**{"batch_size": 4} | settings), torch.float32, say=lambda line: None)
    return Improver(sampler, LatentScale(SCALE), offloaded)


def given(count, device, seed=0):
    """Losers, their prompts, and the noise of the winners."""
    random = torch.Generator().manual_seed(seed)
    losers, noise = (torch.randn(count, 4, 8, 8, generator=random).to(device) for _ in range(2))
    return losers, {"prompt_embeds": 3 * torch.randn(count, 5, 12, generator=random).to(device)}, noise


def expected(unet, losers, conditions, noise, text=3.5, image=3.0):
    """The loop as it is, without a sampler."""
    return sample(lambda *args: Denoise()(unet, *args), solver_table(SCHEDULE, "ddim", 5).to(noise.device), noise,
                  conditions | {"image_latents": losers / SCALE}, EMPTY, double(text, image, EMPTY), torch.float32)


@pytest.mark.parametrize("settings", [{}, {"fuse_projections": True}])
def test_winners_are_drawn_of_the_losers_as_the_vae_gives_them(settings):
    unet, at = network(channels=8), given(7, "cpu")
    drawing = improver(unet, Denoise(), "cpu", **settings)
    want = expected(unet, *at)
    for _ in range(2):
        with drawing.on_device():
            close(drawing.improve(*at), want, 1e-4)
    close(drawing.improve(*(at[0] + 1, *at[1:])) - want, expected(unet, at[0] + 1, *at[1:]) - want, 1e-4)


@gpu
@pytest.mark.parametrize(("text", "image"), [(3.5, 3.0), (3.5, 1.0), (2.0, 2.0), (1.0, 1.0)])
def test_replays_of_double_guidance_follow_the_weights(tmp_path, text, image):
    unet, others, denoise = network(device="cuda", channels=8), [network(seed, "cuda", 8) for seed in range(2)], Denoise()
    pool = Pool(tmp_path, torch.float32, 10**9)
    for index, other in enumerate(others):
        pool.add(index, dict(other.named_parameters()), write=True)
    drawing = improver(unet, denoise, CUDA, offloaded=False, text=text, image=image)
    drawing.improve(*given(4, CUDA))
    calls = denoise.calls
    for index in (1, 0, 1):
        pool.load_into(index, unet)
        for count in (4, 3):  # the second is padded
            at = given(count, CUDA, seed=index + count)
            close(drawing.improve(*at), expected(others[index], *at, text, image))
    assert denoise.calls == calls, "nothing but replays after the capture"


@gpu
def test_no_image_of_a_batch_before_is_left():
    unet = network(device="cuda", channels=8)
    drawing = improver(unet, Denoise(), CUDA, offloaded=False)
    losers, conditions, noise = given(4, CUDA)
    assert drawing.improve(losers * torch.nan, conditions, noise).isnan().all()
    close(drawing.improve(losers, conditions, noise), expected(unet, losers, conditions, noise))


@gpu
@pytest.mark.parametrize("settings", [{}, {"compile": "regional"}, {"compile": "full"}, {"fuse_projections": True}])
def test_it_rests_in_host_memory_and_captures_anew(settings):
    unet, denoise = network(device="cuda", channels=8), Denoise()
    drawing = improver(unet, denoise, CUDA, **settings)
    at = given(4, CUDA)
    want, reserved = expected(unet, *at), []
    for _ in range(3):
        with drawing.on_device():
            close(drawing.improve(*at), want)
        assert all(weight.device.type == "cpu" for weight in unet.parameters())
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] <= reserved[1] + 2**21, "a graph or weights stay on the device"  # the smallest that the allocator asks for


@gpu
def test_two_samplers_with_graphs_of_their_own_take_turns():
    """The policy's past and the improvement model: what one replays does not disturb the other, nor does its release."""
    from captures import Denoise as Plain
    from captures import captured
    from captures import expected as drawn
    from captures import given as prompts

    policy, unet = network(1, "cuda"), network(device="cuda", channels=8)
    one, other = captured(policy, Plain()), improver(unet, Denoise(), CUDA)
    noise, conditions = prompts(4)
    for _ in range(2):
        with other.on_device():
            losers = one.draw(noise, conditions)
            close(losers, drawn(policy, noise, conditions))
            close(other.improve(losers, conditions, noise), expected(unet, losers, conditions, noise))
    close(one.draw(noise, conditions), drawn(policy, noise, conditions))
