"""The flow process: SD3's own training formula, the law of its times, and the target of shared noise."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from seppo_fast.config import Timesteps
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.training.noise import Diffusion, Flow, noise_process
from seppo_fast.training.objective import Objective, Pairs
from tests.tiny import tiny_flux

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
QUANTILES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])


def test_noises_and_asks_as_sd3s_training_script_does():
    process, random = noise_process(FLOW, None, 3.0), torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(6, 4, 5, 5, generator=random) for _ in range(2))
    times = torch.stack([process.time(random) for _ in range(6)])
    sigmas = (times / 1000).view(-1, 1, 1, 1)  # train_dreambooth_sd3.py, get_sigmas and after
    torch.testing.assert_close(process.noised(latents, noise, times), (1.0 - sigmas) * latents + sigmas * noise)
    torch.testing.assert_close(process.target(latents, noise, times), noise - latents)
    for end, want in ((0.0, latents), (1000.0, noise)):
        torch.testing.assert_close(process.noised(latents, noise, torch.full((6,), end)), want)
    video = torch.randn(6, 4, 3, 5, 5)
    assert process.noised(video, video, times).shape == video.shape


@pytest.mark.parametrize("settings,own", [
    (None, 3.0), ({"mean": 0.5, "std": 1.4, "shift": 0.5}, 3.0), ({"density": "uniform"}, 2.0),
])
def test_times_follow_the_law_in_closed_form(settings, own):
    law = Timesteps(**settings or {})
    process, random = noise_process(FLOW, settings and law, own), torch.Generator().manual_seed(1)
    times = torch.stack([process.time(random) for _ in range(20_000)])
    assert times.shape == (20_000,) and times.dtype == torch.float32 and times.min() >= 0 and times.max() <= 1000
    k = own if law.shift == "model" else law.shift
    normal = math.sqrt(2) * torch.erfinv(2 * QUANTILES - 1)
    sigmas = QUANTILES if law.density == "uniform" else torch.sigmoid(law.mean + law.std * normal)
    torch.testing.assert_close(times.quantile(QUANTILES) / 1000, k * sigmas / (1 + (k - 1) * sigmas), rtol=0, atol=0.012)


def test_a_time_depends_on_the_generator_alone():
    process = noise_process(FLOW, None, 3.0)
    torch.manual_seed(1)
    first = process.time(torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    assert torch.equal(first, process.time(torch.Generator().manual_seed(7))) and first.shape == ()


def test_the_models_shift_is_that_of_its_latents(tmp_path):
    model = open_model(str(tiny_flux(tmp_path / "flux")))
    small, large = (noise_process(model.scheduler_config, None, model.time_shift((4, side, side))) for side in (8, 128))
    assert isinstance(small, Flow) and small.shift == pytest.approx(1.583, abs=1e-3)
    assert isinstance(large, Flow) and large.shift == pytest.approx(math.exp(1.15))


def test_ddpm_draws_whole_timesteps_as_before_and_takes_no_law():
    config = dict(DDPMScheduler().config)
    process = noise_process(config)
    assert isinstance(process, Diffusion)
    got = [process.time(torch.Generator().manual_seed(seed)) for seed in range(5)]
    assert got == [torch.randint(1000, (), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    with pytest.raises(UserError, match="seppo.timesteps: this model is no flow"):
        noise_process(config, Timesteps())


def test_shared_noise_does_not_share_the_target():
    random = torch.Generator().manual_seed(2)
    latents, noise = torch.randn(4, 3, 2, 2, generator=random), torch.randn(2, 3, 2, 2, generator=random)
    seen = {}

    def denoise(module, noised, timesteps, conditions):
        seen[module] = noised, timesteps
        return module.weight * noised

    process = noise_process(FLOW)
    objective = Objective(denoise, process, "aaf", torch.float32)
    policy, reference = torch.nn.PReLU(init=0.5), torch.nn.PReLU(init=0.2)
    times = torch.tensor([125.5, 700.25])
    _, table = objective(policy, reference, Pairs(latents, noise, times, {}), 1.0, 100.0)
    both = torch.cat([noise, noise])
    sigma = (torch.cat([times, times]) / 1000).view(-1, 1, 1, 1)
    noised = (1 - sigma) * latents + sigma * both
    for network, weight in ((policy, 0.5), (reference, 0.2)):
        assert torch.equal(seen[network][1], torch.cat([times, times]))  # the same time, in full precision
        torch.testing.assert_close(seen[network][0], noised)
        want = ((weight * noised - (both - latents)) ** 2).flatten(1).mean(1)
        torch.testing.assert_close(table[:, 0:2] if network is policy else table[:, 2:4], want.view(2, 2).T)
