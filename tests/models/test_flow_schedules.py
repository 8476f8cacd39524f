"""The scheduler's configuration of a flow family: read as its pipeline reads it, or refused by name."""

import json
import shutil

import pytest

from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.schedules import is_flow
from seppo_fast.reference.solver import table_of
from tests.tiny import tiny_flux, tiny_sd3

LATENTS = (4, 8, 8)
UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("flows")
    return {"sd3": tiny_sd3(root / "sd3"), "flux": tiny_flux(root / "flux")}


@pytest.fixture
def opened(published, tmp_path):
    """A family's model with another scheduler configuration, and another class in model_index.json."""

    def change(family, changes, name=None, without=()):
        folder = shutil.copytree(published[family], tmp_path / "model")
        file, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in config.items() if key not in without}))
        if name is not None:
            index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", name]}))
        return open_model(str(folder))

    return change


def test_the_class_is_the_one_that_the_pipeline_loads(opened):
    """A file that does not say its class was trained as DDPM's noise."""
    model = opened("sd3", {}, without=["_class_name"])
    assert is_flow(model.scheduler_config) and model.time_shift(LATENTS) == 3.0


@pytest.mark.parametrize("changes", [UNIPC, {key: value for key, value in UNIPC.items() if key != "_class_name"},
                                     UNIPC | {"shift_terminal": 0.02}])
def test_another_schedulers_shift_is_its_own(opened, changes):
    """model_index.json decides, as in diffusers; `shift` (3.0 here) is not UniPC's."""
    model = opened("sd3", changes, "UniPCMultistepScheduler")
    assert model.time_shift(LATENTS) == 5.0
    last = 1000 * (changes.get("shift_terminal") or 5 * 0.25075 / (1 + 4 * 0.25075))  # UniPC rounds down
    assert abs(table_of(model, "unipc", 4, LATENTS).timesteps[-1] - last) <= 1


@pytest.mark.parametrize("key", ["invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas",
                                 "use_beta_sigmas", "use_lu_lambdas"])
def test_what_is_not_followed_is_refused(opened, key):
    with pytest.raises(UserError, match=f"scheduler_config.json: {key} is set, which neither training nor the sampler follows"):
        opened("sd3", {key: True})


@pytest.mark.parametrize("family,changes,name,message", [
    ("sd3", {"shift": 0}, None, "it shifts times by 0, and the shift must be from 0.001 to 1000"),
    ("sd3", {"shift": -3.0}, None, "it shifts times by -3"),
    ("sd3", {"shift": 1e30}, None, "it shifts times by 1e[+]30"),
    ("sd3", {"shift": True}, None, "shift is True, where a number is expected"),
    ("sd3", {"shift": None}, None, "shift is None, where a number is expected"),
    ("sd3", UNIPC | {"flow_shift": None}, "UniPCMultistepScheduler", "flow_shift is None, where a number is expected"),
    ("sd3", {"num_train_timesteps": 0}, None, "num_train_timesteps is 0"),
    ("sd3", {"num_train_timesteps": 999.5}, None, "num_train_timesteps is 999.5, where a whole number is expected"),
    ("sd3", {"shift_terminal": 1.0}, None, "shift_terminal is 1, and must be from 0 to below 1"),
    ("sd3", {"time_shift_type": "cubic"}, None, "cannot be made of it: .*time_shift_type"),
    ("sd3", {}, "DDIMScheduler", "DDIMScheduler follows no flow"),
    ("sd3", UNIPC | {"use_flow_sigmas": False}, "UniPCMultistepScheduler", "follows no flow .*use_flow_sigmas False"),
    ("sd3", {}, "OwnScheduler", "has no scheduler OwnScheduler"),
    ("flux", {"base_shift": None}, None, "base_shift or max_shift is null"),
    ("flux", {"base_image_seq_len": 4096}, None, "base_image_seq_len is 4096, and max_image_seq_len 4096, which must be larger"),
])
def test_what_would_mean_something_else_is_refused(opened, family, changes, name, message):
    with pytest.raises(UserError, match=f"scheduler_config.json: .*{message}"):
        opened(family, changes, name)


@pytest.mark.parametrize("changes", [{"max_shift": 9000.0}, {"base_shift": -1.0, "time_shift_type": "linear"},
                                     {"base_shift": 9000.0}])
def test_a_dynamic_shift_is_checked_for_the_latents_at_hand(opened, changes):
    model = opened("flux", changes)
    with pytest.raises(UserError, match=r"^\S*scheduler_config.json: it shifts times by .* for 16 tokens, and the shift must be"):
        model.time_shift(LATENTS)
    with pytest.raises(UserError, match=r"^\S*scheduler_config.json: it shifts times by"):
        table_of(model, "euler", 4, LATENTS)
