"""The table against the diffusers scheduler's own loop, with a network that is not linear."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from seppo_fast.errors import UserError
from seppo_fast.reference import classifier_free, sample, solver_table

# As in the published directories' scheduler_config.json.
SCHEDULES = {
    "sd-1.5": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
               "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
               "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
               "trained_betas": None},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
             "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
             "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
             "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
             "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False},
    "animatediff": {"_class_name": "DDIMScheduler", "beta_end": 0.012, "beta_schedule": "linear", "beta_start": 0.00085,
                    "clip_sample": False, "num_train_timesteps": 1000, "steps_offset": 1,
                    "timestep_spacing": "linspace"},
    "sd-2.1-v": {"_class_name": "DDIMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
                 "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
                 "prediction_type": "v_prediction", "set_alpha_to_one": False, "skip_prk_steps": True,
                 "steps_offset": 1},
    "karras": {"_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
               "beta_start": 0.00085, "num_train_timesteps": 1000, "solver_order": 2, "solver_type": "midpoint",
               "algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
}
SCHEDULES |= {f"{name}-v": SCHEDULES[name] | {"prediction_type": "v_prediction"} for name in ("sd-1.5", "sdxl", "animatediff")}
CLASSES = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler, "pndm": PNDMScheduler,
           "unipc": UniPCMultistepScheduler, "euler": EulerDiscreteScheduler}


def network(latents, timesteps, conditions=None):
    """Neither linear in the latents nor blind to the timestep, and it mixes positions."""
    t = timesteps.to(latents.dtype).view(-1, *[1] * (latents.dim() - 1)) / 1000
    return torch.tanh(0.8 * latents + 0.4 * latents.roll(1, -1) - t) + 0.1 * torch.sin(3 * latents.roll(1, 1))


def own_loop(solver, config, steps, noise, **settings):
    """What a diffusers pipeline does, at guidance scale 1."""
    scheduler = CLASSES[solver].from_config(config, **settings)
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, t)
        latents = scheduler.step(network(seen, t.expand(len(seen))), t, latents, return_dict=False)[0]
    return latents, scheduler.timesteps


@pytest.mark.parametrize("steps", [5, 8, 20, 50])
@pytest.mark.parametrize("solver", CLASSES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_the_schedulers_own_loop(schedule, solver, steps):
    config = SCHEDULES[schedule]
    settings = {"ddim": {"clip_sample": False}, "pndm": {"skip_prk_steps": True}}.get(solver, {})
    noise = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    want, timesteps = own_loop(solver, config, steps, noise, **settings)
    table = solver_table(config, solver, steps)
    assert torch.equal(table.timesteps.double(), timesteps.double())
    assert want.abs().max() < 100, "the network must not make the solver run away"
    got = sample(network, table, noise.float(), {}, {}, classifier_free(1.0, ()), torch.float32)
    assert got.dtype == torch.float32
    # Rounding in fp32: weights as large as 1/sqrt(alpha_T) = 14.6 cancel, and the network passes errors on.
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-4)
    fine = replay(table, noise)
    torch.testing.assert_close(fine, want.double(), rtol=2e-5, atol=2e-5)


def replay(table, noise):
    """The table's sums in fp64, so that only the coefficients' own rounding is left."""
    known = [noise]
    for i, t in enumerate(table.timesteps):
        seen = sum(w * x for w, x in zip(table.inputs[i].double(), known, strict=False))
        known.append(network(seen, t.expand(len(seen))))
    return sum(w * x for w, x in zip(table.outputs[-1].double(), known, strict=True))


@pytest.mark.parametrize("solver", CLASSES)
def test_every_row_is_the_latents_after_that_step(solver):
    config, noise = SCHEDULES["sd-1.5"], torch.randn(1, 4, 3, 3, dtype=torch.float64)
    scheduler = CLASSES[solver].from_config(config)
    scheduler.set_timesteps(6)
    table = solver_table(config, solver, 6)
    latents, known = noise * scheduler.init_noise_sigma, [noise]
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(latents, t)
        torch.testing.assert_close(sum(w * x for w, x in zip(table.inputs[i].double(), known, strict=False)),
                                   seen.double(), rtol=1e-5, atol=1e-5)
        known.append(network(seen, t.expand(1)).double())
        latents = scheduler.step(known[-1], t, latents, return_dict=False)[0]
        torch.testing.assert_close(sum(w * x for w, x in zip(table.outputs[i].double(), known, strict=False)),
                                   latents.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", CLASSES)
def test_shape_and_causality(solver):
    table = solver_table(SCHEDULES["sd-1.5"], solver, 7)
    calls = 8 if solver == "pndm" else 7
    assert table.timesteps.shape == (calls,) and table.inputs.shape == table.outputs.shape == (calls, calls + 1)
    assert table.inputs.dtype == table.outputs.dtype == torch.float32
    later = torch.arange(calls + 1)[None] > torch.arange(calls)[:, None]
    assert not table.inputs[later].any(), "a call must not see its own output"
    assert not table.outputs[:, 1:][later[:, :-1]].any(), "nor must the latents depend on calls to come"
    moved = table.to("meta")
    assert {t.device.type for t in (moved.timesteps, moved.inputs, moved.outputs)} == {"meta"}


def test_timesteps_between_training_timesteps_are_kept():
    assert solver_table(SCHEDULES["sd-1.5"], "euler", 5).timesteps.tolist() == [999.0, 749.25, 499.5, 249.75, 0.0]
    assert solver_table(SCHEDULES["sdxl"], "euler", 5).timesteps.dtype == torch.long


def test_clipping_and_thresholding_are_off():
    config = SCHEDULES["sd-1.5"] | {"clip_sample": True, "thresholding": True, "skip_prk_steps": False}
    noise = 3 * torch.randn(1, 4, 4, 4, dtype=torch.float64)
    for solver in ("ddim", "dpmsolver++", "unipc"):
        want, _ = own_loop(solver, SCHEDULES["sd-1.5"], 5, noise)
        torch.testing.assert_close(replay(solver_table(config, solver, 5), noise), want.double(), rtol=2e-5, atol=2e-5)


def test_pndm_starts_as_the_config_says():
    silent = {k: v for k, v in SCHEDULES["sd-1.5"].items() if k != "skip_prk_steps"}
    assert len(solver_table(silent, "pndm", 10).timesteps) == 11
    runge_kutta = SCHEDULES["sd-1.5"] | {"skip_prk_steps": False}
    table, noise = solver_table(runge_kutta, "pndm", 10), torch.randn(1, 4, 4, 4, dtype=torch.float64)
    assert len(table.timesteps) > 11
    torch.testing.assert_close(replay(table, noise), own_loop("pndm", runge_kutta, 10, noise)[0], rtol=2e-5, atol=2e-5)


def test_zero_terminal_snr():
    config = SCHEDULES["sd-2.1-v"] | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    noise = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    want, _ = own_loop("ddim", config, 10, noise)
    torch.testing.assert_close(replay(solver_table(config, "ddim", 10), noise), want, rtol=2e-5, atol=2e-5)
    with pytest.raises(UserError, match="rescale_betas_zero_snr"):
        solver_table(config | {"prediction_type": "epsilon"}, "ddim", 10)


def test_a_config_from_json_is_left_alone():
    config = json.loads(json.dumps(SCHEDULES["sdxl"]))
    solver_table(config, "ddim", 5)
    assert config == SCHEDULES["sdxl"]


@pytest.mark.parametrize("changes,solver,steps,message", [
    ({}, "heun", 5, "sampler.solver: 'heun' is not one of ddim, dpmsolver"),
    ({}, "ddim", 0, "sampler.steps: 0 is not between 1 and the model's 1000"),
    ({}, "ddim", 1001, "sampler.steps: 1001 is not between"),
    ({}, "ddim", 1000, "does not work with solver 'ddim' and 1000 steps"),  # steps_offset leads past the last timestep
    ({"prediction_type": "sample"}, "ddim", 5, "prediction_type 'sample'"),
    ({"prediction_type": "flow_prediction"}, "ddim", 5, "sampler.solver: 'ddim' is for DDPM-like models.* use 'euler'"),
])
def test_messages(changes, solver, steps, message):
    with pytest.raises(UserError, match=message):
        solver_table(SCHEDULES["sd-1.5"] | changes, solver, steps)
