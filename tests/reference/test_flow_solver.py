"""Tables of flows against the diffusers schedulers' own loops, set as the pipelines of SD3, FLUX and Wan set them."""

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.reference import classifier_free, sample, solver_table
from seppo_fast.reference.solver import default_solver, plain_steps, table_of
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3

STATIC = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = STATIC | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
WAN = {"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
       "use_flow_sigmas": True, "flow_shift": 5.0, "solver_order": 2, "beta_start": 0.0001, "beta_end": 0.02}
CLASSES = {"euler": FlowMatchEulerDiscreteScheduler, "unipc": UniPCMultistepScheduler, "dpmsolver++": DPMSolverMultistepScheduler}


def with_mu(scheduler, steps):
    scheduler.set_timesteps(steps, mu=0.8)


def as_flux(scheduler, steps):
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.8)


# configuration, solver, how a pipeline sets the steps, and what people give `from_config` to exchange the scheduler
EXCHANGED = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
CASES = {
    "static": (STATIC, "euler", plain_steps, {}),
    "dynamic": (DYNAMIC, "euler", with_mu, {}),
    "linear": (DYNAMIC | {"time_shift_type": "linear"}, "euler", with_mu, {}),
    "flux": (DYNAMIC, "euler", as_flux, {}),
    "terminal": (DYNAMIC | {"shift_terminal": 0.02}, "euler", with_mu, {}),
    "static unipc": (STATIC, "unipc", plain_steps, EXCHANGED | {"flow_shift": 3.0}),
    "dynamic unipc": (DYNAMIC, "unipc", with_mu, EXCHANGED),
    "linear unipc": (DYNAMIC | {"time_shift_type": "linear"}, "unipc", with_mu, EXCHANGED),
    "terminal unipc": (DYNAMIC | {"shift_terminal": 0.02}, "unipc", with_mu, EXCHANGED),
    "static dpmsolver++": (STATIC, "dpmsolver++", plain_steps, EXCHANGED | {"flow_shift": 3.0}),
    "dynamic dpmsolver++": (DYNAMIC, "dpmsolver++", with_mu, EXCHANGED),
    "wan": (WAN, "unipc", plain_steps, {}),
    "wan euler": (WAN, "euler", plain_steps, {"shift": 5.0}),
    "wan dpmsolver++": (WAN, "dpmsolver++", plain_steps, {}),
}


def network(latents, timesteps, conditions=None):
    """Not linear, and not blind to the time."""
    t = timesteps.to(latents.dtype).view(-1, 1, 1, 1) / 1000
    return torch.tanh(0.8 * latents + 0.4 * latents.roll(1, -1) - t) + 0.1 * torch.sin(3 * latents.roll(1, 1))


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("case", CASES)
def test_replays_the_schedulers_own_loop(case, steps):
    config, solver, set_timesteps, exchanged = CASES[case]
    scheduler = CLASSES[solver].from_config(config, **exchanged)
    set_timesteps(scheduler, steps)
    noise = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    latents, timesteps = noise, scheduler.timesteps
    for t in timesteps:
        latents = scheduler.step(network(latents, t.expand(2)), t, latents, return_dict=False)[0]
    table = solver_table(config, solver, steps, set_timesteps=set_timesteps)
    assert torch.equal(table.timesteps.double(), timesteps.double()) and len(timesteps) == steps
    got = sample(network, table, noise.float(), {}, {}, classifier_free(1.0, ()), torch.float32)
    assert (got - latents).norm() <= 1e-5 * latents.norm()


def test_euler_steps_by_the_pipelines_sigmas_to_the_bit():
    """The static shift is in the table that the scheduler is made with, and applied again to what is drawn from its ends."""
    table = solver_table(STATIC, "euler", 4)
    least = 3 * 0.001 / (1 + 2 * 0.001)
    sigmas = torch.tensor([3 * s / (1 + 2 * s) for s in np.linspace(1, least, 4)] + [0.0])
    torch.testing.assert_close(table.timesteps, 1000 * sigmas[:-1].float(), rtol=1e-6, atol=0)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(STATIC)
    scheduler.set_timesteps(4)
    assert torch.equal(table.outputs[-1][1:], scheduler.sigmas.diff()) and table.outputs[-1][0] == 1
    assert table.timesteps.dtype == torch.float32 and solver_table(STATIC, "unipc", 4).timesteps.dtype == torch.int64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("flows")
    return {"sd3": tiny_sd3(root / "sd3"), "flux": tiny_flux(root / "flux"), "schnell": tiny_flux(root / "schnell", dynamic=False),
            "sd": tiny_sd(root / "sd")}


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("name,exponent", [("sd3", None), ("flux", 1), ("schnell", None)])
def test_a_models_table_has_its_pipelines_shift(folders, name, exponent, side):
    model = open_model(str(folders[name]))
    table = table_of(model, "euler", 4, (4, side, side))
    shift = model.time_shift((4, side, side))
    if exponent is not None:
        mu = 0.5 + ((side // 2) ** 2 - 256) * (1.15 - 0.5) / (4096 - 256)
        assert shift == pytest.approx(math.exp(mu))
    sigmas = torch.linspace(1, 0.25, 4) if name != "sd3" else torch.linspace(1, 0.003 / 1.002, 4)
    torch.testing.assert_close(table.timesteps.float(), 1000 * shift * sigmas / (1 + (shift - 1) * sigmas), rtol=1e-5, atol=1e-4)


def test_the_default_solver_is_one_that_the_models_have(folders):
    sd, sd3 = (open_model(str(folders[name])) for name in ("sd", "sd3"))
    assert [default_solver(models) for models in ([sd], [sd3], [sd, sd3])] == ["ddim", "euler", "euler"]
    assert sd.time_shift((4, 8, 8)) == 1.0


@pytest.mark.parametrize("config,solver,steps,message", [
    (STATIC, "ddim", 4, "seppo.sampler.solver: 'ddim' is for DDPM-like models, and .* use 'euler', 'dpmsolver[+][+]', 'unipc'"),
    (STATIC, "pndm", 4, "seppo.sampler.solver: 'pndm' is for DDPM-like models"),
    (STATIC, "heun", 4, "seppo.sampler.solver: 'heun' is not one of"),
    (STATIC, "euler", 0, "seppo.sampler.steps: 0 is not between 1 and the model's 1000"),
    (STATIC | {"shift_terminal": 0.02}, "dpmsolver++", 4, "does not know the shift_terminal .* use 'euler' or 'unipc'"),
    (DYNAMIC | {"time_shift_type": "linear"}, "dpmsolver++", 4, "does not know the linear time_shift_type"),
    (WAN | {"flow_shift": -5.0}, "unipc", 4, "where the model was trained on 0 to 1000"),
])
def test_messages(config, solver, steps, message):
    with pytest.raises(UserError, match=message):
        solver_table(config, solver, steps)
