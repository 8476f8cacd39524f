"""Settings of cheap rollouts that mean nothing, or something else: a clear message, by --dry-run too, before anything loads."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from training.adapter_files import write_lora

from seppo_fast.configfile import parse_config
from seppo_fast.errors import UserError
from seppo_fast.planning.dry_run import dry_run

Settings = Callable[..., dict[str, Any]]
INTERVAL = "seppo.sampler.guidance_interval"
WITH = {"seppo.sampler.adapter": "x", "seppo.sampler.solver": "lcm"}
LCM = {"seppo.sampler.solver": "lcm", "seppo.sampler.steps": 2, "seppo.sampler.guidance_scale": 1.0}


@pytest.fixture(scope="module")
def lora(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(sd, tmp_path_factory.mktemp("lora") / "lcm.safetensors")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux(tmp_path_factory.mktemp("models") / "flux")


@pytest.mark.parametrize(("changes", "said"), [
    ({INTERVAL: [0.5, 0.5]}, r"guidance_interval \[0.5, 0.5\] is empty"),
    ({INTERVAL: [0.8, 0.2]}, r"guidance_interval \[0.8, 0.2\] is empty"),
    ({INTERVAL: [-0.1, 1.0]}, "greater than or equal to 0"), ({INTERVAL: [0.0, 1.2]}, "less than or equal to 1"),
    ({INTERVAL: [0.1, 0.2, 0.3]}, "at most 2"), ({INTERVAL: [0.5]}, "at least 2"), ({INTERVAL: 0.5}, "guidance_interval"),
    ({INTERVAL: ["0.1", "0.9"]}, "guidance_interval"), ({INTERVAL: [float("nan"), 1.0]}, "guidance_interval"),
    ({INTERVAL: "[0.1, 0.9]"}, "guidance_interval"), ({INTERVAL: None}, "guidance_interval"),
    ({INTERVAL: [0.2, 0.8], "seppo.sampler.guidance_scale": 1.0}, "guidance_interval does not go with guidance_scale 1"),
    ({"seppo.sampler.unconditional_every": 0}, "unconditional_every"),
    ({"seppo.sampler.unconditional_every": 2, "seppo.sampler.guidance_scale": 1.0}, "unconditional_every does not go with"),
    ({"seppo.sampler.solver": "lcm"}, "solver='lcm' is for networks that were distilled"),
    ({"seppo.sampler.adapter_scale": 0.5}, "adapter_scale=0.5 goes with sampler.adapter, which is not set"),
    ({"seppo.sampler.spacing": "karras"}, "spacing"),
    ({INTERVAL: [0.2, 0.8], "seppo.method": "improvement"}, "sampler.guidance_interval does not go with method='improvement'"),
    ({"seppo.samples.guidance_scale": 3.0, "seppo.method": "improvement"}, "samples.guidance_scale does not go with method='impr"),
    ({"seppo.sampler": {"adapter": "x", "steps": 4}}, "sampler.solver is needed with sampler.adapter"),
    ({"seppo.sampler": {"adapter": "x", "solver": "lcm"}}, "sampler.steps is needed with sampler.adapter"),
    ({"seppo.sampler.adapter": ""}, "adapter"), ({"seppo.sampler.adapter": 4}, "adapter"),
    ({**WITH, "seppo.sampler.fuse_projections": True}, "fuse_projections"),
    *(({**WITH, "seppo.method": method}, f"method='{method}', which draws no") for method in ("sft", "dpo", "improvement")),
    ({**WITH, "seppo.method": "iterative_dpo", "seppo.improvement.path": "y"}, "the improvement model, which was not distilled"),
    ({**WITH, "seppo.samples.every": 1}, "samples.solver is needed with"),
    ({"seppo.samples.solver": "lcm"}, "samples.solver"), ({"seppo.samples.steps": 0}, "samples.steps"),
    ({"seppo.sampler.samples_per_iteration": 8, "seppo.reference_score": "rollout"}, "a sample is used more than once"),
], ids=str)
def test_what_the_configuration_shows(changes: dict[str, Any], said: str, settings: Settings) -> None:
    with pytest.raises(UserError, match=said):
        parse_config(settings(**changes))


@pytest.mark.parametrize(("changes", "said"), [
    ({INTERVAL: [0.4, 0.6]}, r"guidance_interval: none of the 3 steps lies in \[0.4, 0.6\]; they are at 0.667, 0.334, 0.001"),
    ({"seppo.sampler.steps": 1}, "seppo.sampler.steps: solver 'ddim' with 1 step begins at timestep 1 of 1000"),
    ({"seppo.samples": {"every": 1, "steps": 1}}, "seppo.samples.steps: solver 'ddim' with 1 step begins at timestep 1 of 1000"),
    ({"seppo.samples": {"every": 1, "steps": 2000}}, "seppo.samples.steps: 2000 is not between 1 and the model's 1000"),
    ({INTERVAL: [0.3, 0.4], "seppo.samples": {"every": 1, "steps": 2}}, r"none of the 2 steps lies in \[0.3, 0.4\]"),
], ids=str)
def test_what_the_model_shows(changes: dict[str, Any], said: str, settings: Settings) -> None:
    with pytest.raises(UserError, match=said):
        dry_run(parse_config(settings(**changes)), 1)


def test_what_a_flow_and_an_embedded_guidance_show(settings: Settings, flux: Path, tmp_path: Path) -> None:
    sd3 = str(tiny_sd3(tmp_path / "sd3", num_layers=1))
    for path, changes, said in (
            (str(flux), {INTERVAL: [0.1, 0.9]}, "guidance_interval: .* is guided by an input of its network"),
            (str(flux), {"seppo.sampler.unconditional_every": 2}, "unconditional_every: .* is guided by an input"),
            (str(flux), {"seppo.sampler.adapter": "x", "seppo.sampler.guidance_scale": 1},
             "guidance_scale: .* is given the scale as an input, in training too"),
            (sd3, {"seppo.sampler.spacing": "trailing"}, "seppo.sampler.spacing: 'trailing' has no meaning for a flow"),
            (sd3, {"seppo.samples": {"every": 1, "solver": "ddim"}}, "seppo.samples.solver: 'ddim' is for DDPM-like models"),
            (sd3, {"seppo.sampler.adapter": "x", **LCM}, "seppo.sampler.adapter x: there is no such file here")):
        config = parse_config(settings(**{"seppo.model.path": path, "seppo.sampler.solver": "euler", **changes}))
        with pytest.raises(UserError, match=said):
            dry_run(config, 1)


def test_a_guidance_as_an_input_is_shown_as_samples_says(settings: Settings, train: Any, flux: Path, tmp_path: Path) -> None:
    """Two runs that differ by the grids' guidance alone draw other grids."""
    grids = []
    for scale in (1.0, 6.0):
        run = train(settings(**{
            "seppo.model.path": str(flux), "seppo.output_dir": str(tmp_path / str(scale)), "seppo.model.lora": {"rank": 2},
            "seppo.iterations": 1, "seppo.updates_per_iteration": 1, "train_batch_size": 2, "train_micro_batch_size_per_gpu": 2,
            "seppo.sampler": {"solver": "euler", "steps": 1, "guidance_scale": 1.0, "batch_size": 2},
            "seppo.samples": {"every": 1, "prompts": ["a red cat"], "guidance_scale": scale, "steps": 2}}))
        grids.append((run / "samples" / "update_00000000.png").read_bytes())
    assert grids[0] != grids[1]


Damage = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
DAMAGED: dict[str, tuple[Damage, str]] = {
    "NaN": (lambda raw: {name: value * float("nan") for name, value in raw.items()}, "tensors with NaN or infinity"),
    "other widths": (lambda raw: {name: torch.cat([value, value], dim=1) if "lora_A" in name else value
                                  for name, value in raw.items()}, "does not fit the model's unet"),
    "a text encoder's part": (lambda raw: raw | {
        f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, 32)), ("B", (32, 2)))}, "changes text encoders, too"),
    "a text encoder alone": (lambda raw: {
        f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, 32)), ("B", (32, 2)))}, "has no weights for a UNet"),
    "DoRA": (lambda raw: raw | {f"{name.split('.lora_')[0]}.lora_magnitude_vector.weight": torch.ones(4) for name in raw},
             "is a DoRA"),
    "LoKr": (lambda raw: {"lora_unet_down_blocks_0_attentions_0_proj_in.lokr_w1": torch.ones(2, 2),
                          "lora_unet_down_blocks_0_attentions_0_proj_in.lokr_w2": torch.ones(4, 4)}, "no LoRA"),
    "LoHa": (lambda raw: {f"lora_unet_down_blocks_0_attentions_0_proj_in.hada_w{i}_{side}": torch.ones(2, 2)
                          for i in "12" for side in "ab"}, "no LoRA"),
    "nothing": (lambda raw: {}, "adapter|LoRA|tensors"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_the_adapters_content_shows(kind: str, settings: Settings, lora: Path, tmp_path: Path) -> None:
    change, said = DAMAGED[kind]
    file = tmp_path / "changed.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(lora)).items()}, file)
    with pytest.raises(UserError, match=said) as raised:
        dry_run(parse_config(settings(**{"seppo.sampler.adapter": str(file), **LCM})), 1)
    assert str(file) in str(raised.value)


def test_what_the_adapters_file_shows(settings: Settings, sd: Path, lora: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "lora.bin")
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    xl, sd3 = tiny_sdxl(tmp_path / "sdxl"), tiny_sd3(tmp_path / "sd3", num_layers=1)
    other = tiny_sd(tmp_path / "wide")
    write_lora(sd3, tmp_path / "of_sd3.safetensors", targets=("to_q",))
    write_lora(xl, tmp_path / "of_sdxl.safetensors", targets=("to_q",))
    write_lora(other, tmp_path / "of_another.safetensors")
    for name, said in (("missing.safetensors", "there is no such file here"), ("empty", "the folder has no pytorch_lora_weights"),
                       ("lora.bin", "lora.bin"), ("cut.safetensors", "cut.safetensors"), ("of_sd3.safetensors", "of_sd3"),
                       ("of_sdxl.safetensors", "of_sdxl"), ("of_another.safetensors", "of_another")):
        with pytest.raises(UserError, match=said):
            dry_run(parse_config(settings(**{"seppo.sampler.adapter": str(tmp_path / name), **LCM})), 1)
    with pytest.raises(UserError, match="the folder has no pytorch_lora_weights"):  # a full model, as LCM's first ones are
        dry_run(parse_config(settings(**{"seppo.sampler.adapter": str(sd), **LCM})), 1)


@pytest.mark.parametrize("solver", ["lcm", "tcd"])
def test_more_steps_than_it_was_distilled_from(solver: str, settings: Settings, lora: Path) -> None:
    changes = LCM | {"seppo.sampler.solver": solver, "seppo.sampler.adapter": str(lora)}
    with pytest.raises(UserError, match=f"solver '{solver}' and 60 steps .*; choose another solver or number of steps"):
        dry_run(parse_config(settings(**{**changes, "seppo.sampler.steps": 60})), 1)
    with pytest.raises(UserError, match=f"seppo.sampler.spacing: 'leading' has no meaning for '{solver}'"):
        dry_run(parse_config(settings(**{**changes, "seppo.sampler.spacing": "leading"})), 1)


def test_a_policy_is_no_adapter(settings: Settings, train: Any, tmp_path: Path) -> None:
    run = train(settings(**{"seppo.model.lora": {"rank": 2}, "seppo.iterations": 1}))
    for policy in (run / "final", run / "final" / "pytorch_lora_weights.safetensors"):
        with pytest.raises(UserError, match="is a policy that seppo_fast trained, no distillation"):
            dry_run(parse_config(settings(**{"seppo.sampler.adapter": str(policy), **LCM})), 1)
    past = sorted((run / "pool").glob("*.safetensors"))[-1]
    alone = Path(shutil.copy(past, tmp_path / "alone.safetensors"))
    for file in (past, alone):
        with pytest.raises(UserError, match=file.name):
            dry_run(parse_config(settings(**{"seppo.sampler.adapter": str(file), **LCM})), 1)


def test_the_plan_prints_each_key(settings: Settings, lora: Path) -> None:
    said = dry_run(parse_config(settings(**{INTERVAL: [0.2, 0.9], "seppo.sampler.unconditional_every": 2,
                                            "seppo.sampler.spacing": "trailing"})), 1)
    assert ("ddim, 3 steps, trailing spacing, guidance 2 at noise levels from 0.2 to 0.9, the branch without the prompt every 2"
            " steps\n") in said
    said = dry_run(parse_config(settings(**{"seppo.sampler.adapter": str(lora), **LCM, "seppo.samples": {
        "every": 2, "solver": "ddim", "steps": 3, "guidance_scale": 2.0}})), 1)
    assert f"lcm, 2 steps, guidance 1, with the adapter {lora}\n" in said
    assert "  grids, evaluations" in said and "the policy by itself; ddim, 3 steps, guidance 2\n" in said


def test_other_settings_in_the_time_plan_need_not_work(settings: Settings) -> None:
    """A narrow interval has no step of the fewer ones that the plan compares with; the run itself is in order."""
    wide, narrow = (dry_run(parse_config(settings(**{INTERVAL: interval, "seppo.sampler.steps": 200})), 1)
                    for interval in ([0.4, 0.6], [0.49, 0.5]))
    assert "as configured" in narrow and "ddim, 50 steps" in wide and "ddim, 50 steps" not in narrow


def test_limits_hold_for_grids_unless_they_have_a_guidance_of_their_own(settings: Settings) -> None:
    limited = {INTERVAL: [0.2, 0.8], "seppo.sampler.spacing": "trailing"}
    shown = parse_config(settings(**limited, **{"seppo.samples": {"every": 1, "steps": 7}})).seppo.shown
    assert (shown.steps, shown.guidance_interval, shown.spacing, shown.solver) == (7, [0.2, 0.8], "trailing", "ddim")
    own = {"every": 1, "guidance_scale": 4.0, "solver": "unipc"}
    shown = parse_config(settings(**limited, **{"seppo.samples": own})).seppo.shown
    assert (shown.steps, shown.guidance_interval, shown.spacing, shown.guidance_scale) == (3, [0.0, 1.0], None, 4.0)
    ours = parse_config(settings(**limited, **{"seppo.samples": {"steps": 7}})).seppo
    assert ours.shown is ours.sampler, "nothing is shown"
