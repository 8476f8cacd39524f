"""A diffusers scheduler as a table of coefficients.

Every diffusers solver here is linear in the initial noise, the network's outputs, and the noises that it adds on its way.
So one pass over the identity reads all coefficients: what the scheduler returns for one-hot vectors *is* its row of
coefficients. A step of sampling is then the network and one weighted sum, with no tables on the host and no branches on values.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from seppo_fast import config
from seppo_fast.errors import UserError, reason
from seppo_fast.models import Model
from seppo_fast.models.schedules import is_flow, static_shift
from seppo_fast.sampling import FEW_STEPS

# Clipping and thresholding are for pixels, and are not linear. The other settings are those that each name stands for.
SOLVERS: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "thresholding": False}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2,
                                                  "variance_type": None, "thresholding": False}),
    "pndm": (PNDMScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {"thresholding": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "lcm": (LCMScheduler, {"clip_sample": False, "thresholding": False}),
    "tcd": (TCDScheduler, {"clip_sample": False, "thresholding": False}),
}
FLOW_SETTINGS: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_SOLVERS: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {**FLOW_SETTINGS, **SOLVERS["dpmsolver++"][1]}),
    "unipc": (UniPCMultistepScheduler, {**FLOW_SETTINGS, **SOLVERS["unipc"][1]}),
}
LEAST = 0.4  # the share of the schedule at which the first call must be; two leading steps are at 0.5 and 0
ZERO_SNR = " (it does not know rescale_betas_zero_snr)"


@dataclass(frozen=True)
class SolverTable:
    """A solver of S calls of the network; a row holds the weights of [initial noise N(0, I), output 0, ..., output S-1], and
    then of the K noises N(0, I) that the solver adds on its way (LCM and TCD: S - 1).

    `inputs[i]` gives the latents that call i sees, `outputs[i]` the latents after it, so `outputs[-1]` gives the sample.
    PNDM calls the network more than `steps` times. `levels[i]` is the noise level of call i, as a share of the schedule.
    """

    timesteps: Tensor  # (S,) long; fp32 where the scheduler's lie between training timesteps (Euler)
    inputs: Tensor  # (S, 1 + S + K) fp32
    outputs: Tensor  # (S, 1 + S + K) fp32
    levels: tuple[float, ...]  # 0 is a sample, 1 is noise

    @property
    def noises(self) -> int:
        """How many noises the solver adds on its way."""
        return self.inputs.shape[1] - 1 - self.inputs.shape[0]

    def to(self, device: torch.device | str) -> "SolverTable":
        """The same table on `device`."""
        return replace(self, timesteps=self.timesteps.to(device), inputs=self.inputs.to(device), outputs=self.outputs.to(device))


def open_scheduler(scheduler_config: Mapping[str, Any], solver: str, label: str = "seppo.sampler.") -> Any:
    """The diffusers scheduler that `solver` names, with the noise schedule and settings of `scheduler_config`."""
    if solver not in SOLVERS:
        raise UserError(f"{label}solver: {solver!r} is not one of {', '.join(SOLVERS)}")
    if is_flow(scheduler_config):
        return open_flow(scheduler_config, solver, label)
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"the model's scheduler config has prediction_type {prediction!r};"
                        " only 'epsilon' and 'v_prediction' can be sampled from")
    cls, settings = SOLVERS[solver]
    if solver == "pndm":
        # Its Runge-Kutta start costs nine more calls. Stable Diffusion skips it; other schedulers' configs do not say.
        settings = {"skip_prk_steps": scheduler_config.get("skip_prk_steps", True)}
    try:
        scheduler = cls.from_config(dict(scheduler_config), **settings)
    except Exception as error:  # the configuration is the only input
        raise UserError(f"the model's scheduler config does not work with solver {solver!r} ({reason(error)}); choose another"
                        " solver") from error
    trained = DDPMScheduler.from_config(dict(scheduler_config)).alphas_cumprod
    # Some schedulers keep the last alpha of rescale_betas_zero_snr a little above 0.
    if not torch.allclose(scheduler.alphas_cumprod.float(), trained.float(), rtol=1e-4, atol=1e-6):
        raise UserError(f"solver {solver!r} makes another noise schedule of the model's scheduler config than training does"
                        f"{ZERO_SNR * bool(scheduler_config.get('rescale_betas_zero_snr'))}; choose another solver")
    return scheduler


def open_flow(scheduler_config: Mapping[str, Any], solver: str, label: str) -> Any:
    """The diffusers scheduler that `solver` names, for a flow with the shift of `scheduler_config`, whichever scheduler's it is."""
    if solver not in FLOW_SOLVERS:
        raise UserError(f"{label}solver: {solver!r} is for DDPM-like models, and this model is trained by flow matching; use"
                        f" {', '.join(map(repr, FLOW_SOLVERS))}")
    linear = scheduler_config.get("use_dynamic_shifting") and scheduler_config.get("time_shift_type") == "linear"
    if solver == "dpmsolver++" and (linear or scheduler_config.get("shift_terminal")):
        raise UserError(f"{label}solver: 'dpmsolver++' does not know the {'linear time_shift_type' if linear else 'shift_terminal'}"
                        " of the model's scheduler config; use 'euler' or 'unipc'")
    cls, settings = FLOW_SOLVERS[solver]
    shift = {"shift" if solver == "euler" else "flow_shift": static_shift(scheduler_config)}
    try:
        return cls.from_config(dict(scheduler_config), **settings, **shift)
    except Exception as error:  # the configuration is the only input
        raise UserError(f"the model's scheduler config does not work with solver {solver!r} ({reason(error)}); choose another"
                        " solver") from error


def default_solver(models: Iterable[Model]) -> str:
    """The solver of a command that was given none."""
    return "euler" if any(is_flow(model.scheduler_config) for model in models) else "ddim"


def table_of(model: Model, solver: str, steps: int, latents: Sequence[int], label: str = "seppo.sampler.",
             spacing: str | None = None) -> SolverTable:
    """`solver` with `steps` steps as the model's pipeline sets them for latents of this shape; `spacing` None: the model's own."""
    scheduler_config = dict(model.scheduler_config)
    if spacing is not None:
        if is_flow(scheduler_config) or solver in FEW_STEPS:
            whose = "a flow" if is_flow(scheduler_config) else f"{solver!r}"
            raise UserError(f"{label}spacing: {spacing!r} has no meaning for {whose}, whose steps are spaced in its own way; leave"
                            " it out")
        scheduler_config["timestep_spacing"] = spacing
    return solver_table(scheduler_config, solver, steps, label, partial(model.set_timesteps, latents=latents))


def rollout_table(model: Model, settings: config.Sampler, latents: Sequence[int], label: str = "seppo.sampler.") -> SolverTable:
    """The solver by which rollouts with latents of this shape are drawn, or by other settings the samples that show the policy.

    `UserError` where its first call takes the initial noise for a nearly clean sample, as one step of "leading" spacing does.
    """
    table = table_of(model, settings.solver, settings.steps, latents, label, settings.spacing)
    if table.levels[0] < LEAST:
        raise UserError(f"{label}steps: solver {settings.solver!r} with {settings.steps} step{'s' * (settings.steps > 1)} begins at"
                        f" timestep {float(table.timesteps[0]):g} of {model.num_train_timesteps}, where a sample is nearly clean,"
                        " and would draw noise; take more steps, another solver, or sampler.spacing \"trailing\"")
    return table


def plain_steps(scheduler: Any, steps: int) -> None:
    """Set a scheduler to so many steps in its own way."""
    scheduler.set_timesteps(steps)


def solver_table(scheduler_config: Mapping[str, Any], solver: str, steps: int, label: str = "seppo.sampler.",
                 set_timesteps: Callable[[Any, int], None] = plain_steps) -> SolverTable:
    """`solver` with `steps` steps on the schedule of `scheduler_config`, as a table on the CPU (DDIM's eta 0, TCD's 0.3).

    `set_timesteps(scheduler, steps)` is how the model's pipeline sets the scheduler; `label` is put before the names in messages.
    """
    scheduler = open_scheduler(scheduler_config, solver, label)
    trained = scheduler.config.num_train_timesteps
    if not 1 <= steps <= trained:
        raise UserError(f"{label}steps: {steps} is not between 1 and the model's {trained} training timesteps")
    try:
        set_timesteps(scheduler, steps)
        timesteps, inputs, outputs = _coefficients(scheduler)
    except UserError:
        raise
    except Exception as error:  # the configuration is the only input
        raise UserError(f"sampler: the model's scheduler config does not work with solver {solver!r} and {steps} steps"
                        f" ({reason(error)}); choose another solver or number of steps") from error
    most = trained if is_flow(scheduler_config) else trained - 1
    if timesteps.min() < 0 or timesteps.max() > most:
        raise UserError(f"sampler: solver {solver!r} of {steps} steps asks for timestep {float(timesteps.max()):g}"
                        f" where the model was trained on 0 to {most}: is steps_offset, or another key of its scheduler"
                        " config, wrong?")
    if not (inputs.isfinite().all() and outputs.isfinite().all()):
        raise UserError(f"sampler: solver {solver!r} divides by zero on the model's noise schedule at {steps} steps (an"
                        " epsilon model with rescale_betas_zero_snr?); choose another solver or number of steps")
    return SolverTable(timesteps, inputs, outputs, tuple((timesteps.double() / trained).tolist()))


def _coefficients(scheduler: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps, inputs and outputs of a `SolverTable`, by one pass of `scheduler` over the identity."""
    calls = len(scheduler.timesteps)
    terms = 2 * calls if isinstance(scheduler, (LCMScheduler, TCDScheduler)) else calls + 1
    # UniPC insists on 4-D latents
    one_hot = torch.eye(terms, dtype=torch.float64).view(terms, 1, terms, 1, 1)
    latents = one_hot[0] * float(getattr(scheduler, "init_noise_sigma", 1.0))
    inputs, outputs = [], []
    for i, timestep in enumerate(scheduler.timesteps):
        scaled = getattr(scheduler, "scale_model_input", None)
        inputs.append((scaled(latents, timestep) if scaled else latents).flatten())
        if terms == calls + 1:
            latents = scheduler.step(one_hot[i + 1], timestep, latents, return_dict=False)[0]
        else:
            added, share = _added_noise(scheduler, timestep, latents)
            seeded = torch.Generator().manual_seed(0)
            latents = scheduler.step(one_hot[i + 1], timestep, latents, generator=seeded, return_dict=False)[0] - added
            if i + 1 < calls:
                latents = latents + share * one_hot[1 + calls + i]
        outputs.append(latents.flatten())
    timesteps = scheduler.timesteps
    whole = all(math.isclose(t, round(t), abs_tol=0) for t in timesteps.tolist())
    return timesteps.long() if whole else timesteps.float(), torch.stack(inputs).float(), torch.stack(outputs).float()


def _added_noise(scheduler: Any, timestep: Tensor, like: Tensor) -> tuple[Tensor, float]:
    """What a step adds of the noise that seed 0 gives it, and the weight of it: that is what the step makes of zeros."""
    nothing, seeded = torch.zeros_like(like), torch.Generator().manual_seed(0)
    added = copy.deepcopy(scheduler).step(nothing, timestep, nothing, generator=seeded, return_dict=False)[0]
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=like.dtype)
    return added, float((added * noise).sum() / (noise * noise).sum())
