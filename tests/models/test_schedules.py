"""A noise schedule that the pipeline's own scheduler reads otherwise than training does is refused, whatever the class."""

import json
from pathlib import Path

import diffusers
import pytest

from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.reference.solver import solver_table

# What Stable Diffusion, SDXL and AnimateDiff directories are published and saved with, and what people exchange it for.
FOLLOW = ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
          "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler", "UniPCMultistepScheduler"]
IGNORE = ["PNDMScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "HeunDiscreteScheduler",
          "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "SASolverScheduler"]


def with_scheduler(folder: Path, name: str, **changes: object) -> Path:
    """The pipeline with another class of scheduler, as model_index.json and the scheduler's own file name it."""
    file, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": name} | changes))
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", name]}))
    return folder


@pytest.mark.parametrize("name", FOLLOW + IGNORE)
def test_without_zero_snr_every_class_is_taken(own_sd: Path, name: str) -> None:
    assert open_model(str(with_scheduler(own_sd, name))).num_train_timesteps == 1000


@pytest.mark.parametrize("name", FOLLOW)
def test_zero_snr_is_followed_where_the_class_does(own_sd: Path, name: str) -> None:
    open_model(str(with_scheduler(own_sd, name, rescale_betas_zero_snr=True)))


@pytest.mark.parametrize("name", IGNORE)
def test_zero_snr_is_refused_where_the_class_ignores_it(own_sd: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"scheduler_config.json: {name} makes another noise schedule .*rescale_betas_zero_snr"):
        open_model(str(with_scheduler(own_sd, name, rescale_betas_zero_snr=True)))
    open_model(str(with_scheduler(own_sd, name, rescale_betas_zero_snr=False)))


def test_the_base_of_a_motion_adapter_is_read_by_its_own_class(own_sd: Path, adapter_folder: Path) -> None:
    with pytest.raises(UserError, match="PNDMScheduler makes another noise schedule"):
        open_model(str(with_scheduler(own_sd, "PNDMScheduler", rescale_betas_zero_snr=True)), motion_adapter=str(adapter_folder))


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("CogVideoXDDIMScheduler", {}, "makes another noise schedule"),
    ("EDMEulerScheduler", {}, "has no DDPM-like noise schedule"),
    ("OwnScheduler", {}, "has no scheduler OwnScheduler"),
    ("UnCLIPScheduler", {}, "cannot be made of it: .*squaredcos_cap_v2"),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas is set"),
])
def test_other_schedules_are_refused(own_sd: Path, name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_model(str(with_scheduler(own_sd, name, **changes)))


def test_values_that_are_left_out_are_the_classs_own(own_sd: Path) -> None:
    """Heun's beta_end is 0.012 where DDPM's is 0.02."""
    file = with_scheduler(own_sd, "HeunDiscreteScheduler") / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    del config["beta_end"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="HeunDiscreteScheduler makes another noise schedule"):
        open_model(str(own_sd))


def test_a_solver_that_ignores_zero_snr_is_refused() -> None:
    config = dict(diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction",
                                          timestep_spacing="trailing").config)
    with pytest.raises(UserError, match="solver 'pndm' makes another .*rescale_betas_zero_snr.*choose another solver"):
        solver_table(config, "pndm", 10)
    solver_table(config, "ddim", 10)
