"""Solvers with one, two and three steps: the table is the scheduler's own loop, noises that it adds on its way included."""

import pytest
import torch

from seppo_fast.reference.solver import FLOW_SOLVERS, SOLVERS, open_scheduler, solver_table

SD = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
      "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}
CASES = [(name, SD | {"timestep_spacing": spacing}, solver) for name, spacing in
         (("leading", "leading"), ("trailing", "trailing"), ("linspace", "linspace")) for solver in SOLVERS]
CASES += [("zero snr", SD | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
           solver) for solver in SOLVERS if solver != "pndm"]
CASES += [("flow", {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}, solver)
          for solver in FLOW_SOLVERS]


@pytest.mark.parametrize(("schedule", "solver"), [case[1:] for case in CASES], ids=[f"{case[0]}-{case[2]}" for case in CASES])
def test_the_table_is_the_schedulers_own_loop(schedule, solver):
    for steps in (1, 2, 3):
        table, scheduler = solver_table(schedule, solver, steps), open_scheduler(schedule, solver)
        scheduler.set_timesteps(steps)
        random, later = torch.Generator().manual_seed(0), torch.Generator().manual_seed(5)
        calls = len(scheduler.timesteps)
        known = [torch.randn(2, 4, 3, 3, generator=random, dtype=torch.float64) for _ in range(1 + calls)]
        latents = known[0] * float(getattr(scheduler, "init_noise_sigma", 1.0))
        adds = {"generator": later} if solver in ("lcm", "tcd") else {}
        for output, t in zip(known[1:], scheduler.timesteps, strict=True):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(latents, t)
            latents = scheduler.step(output, t, latents, return_dict=False, **adds)[0]
        assert table.noises == (calls - 1 if adds else 0)
        again = torch.Generator().manual_seed(5)
        known += [torch.randn(2, 4, 3, 3, generator=again, dtype=torch.float64) for _ in range(table.noises)]
        got = torch.einsum("k,k...->...", table.outputs[-1].double(), torch.stack(known))
        torch.testing.assert_close(got, latents, rtol=1e-5, atol=1e-5 * float(latents.abs().max()))
