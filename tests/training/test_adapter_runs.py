"""Whole runs whose losers are drawn with a few-step adapter, or guided in an interval: plain diffusers draws the same ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler, UNet2DConditionModel
from forked import Forks
from outcomes import apart, check_kill, column, identical, rows, weights
from tiny import tiny_sd3
from training.adapter_files import drawn_by_diffusers, stored, write_lora

from seppo_fast.checksums import checksum
from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.data.order import Order
from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.planning.cost import estimate
from seppo_fast.reference import Sampler
from seppo_fast.seeds import normal
from seppo_fast.training.adapter import read

PROMPTS = ("a handwritten one", "a handwritten two", "a handwritten three")  # of the demonstrations, in turn
Settings, Train = Callable[..., dict[str, Any]], Callable[..., Path]
# The set of 8 is used twice. The checkpoint within the iteration keeps it.
ONE = {"seppo.iterations": 1, "seppo.updates_per_iteration": 2, "seppo.seed": 3, "seppo.checkpoint": {"every": 1, "keep_last": 2}}
SHOWN = {"solver": "ddim", "steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def lora(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(sd, tmp_path_factory.mktemp("lora") / "lcm.safetensors")


@pytest.fixture
def few(settings: Settings, lora: Path) -> Settings:
    """`few(**changes)`: two LCM steps with the adapter, 8 samples for two updates."""
    sampler = {"adapter": str(lora), "solver": "lcm", "steps": 2, "batch_size": 8, "samples_per_iteration": 8}
    return lambda **changes: settings(**{**ONE, "seppo.sampler": sampler, **changes})


def prompts_of(count: int) -> list[str]:
    """The prompts of the first slots; the cache has the demonstrations in their order."""
    order = Order(24, ONE["seppo.seed"])
    return [PROMPTS[order.row(slot) % len(PROMPTS)] for slot in range(count)]


@pytest.fixture(scope="module")
def wanted(sd: Path, lora: Path) -> torch.Tensor:
    return drawn_by_diffusers(sd, LCMScheduler, 2, prompts_of(8), 3, lora)


ROUNDED = 0.2  # of what the adapter changes, on average
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "all weights": ({}, 2e-3), "lora": ({"seppo.model.lora": {"rank": 2}}, 2e-3),
    "blocks in host memory": ({"seppo.reference_offload": "blocks"}, 2e-3),
    "zero 3": ({"zero_optimization": {"stage": 3}}, 2e-3), "bf16": ({"bf16": {"enabled": True}}, ROUNDED),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, ROUNDED),
    "batches of 3": ({"seppo.sampler.batch_size": 3}, 2e-3),
}


@pytest.mark.parametrize("way", WAYS)
def test_losers_are_those_of_plain_diffusers(way: str, few: Settings, train: Train, sd: Path, wanted: torch.Tensor) -> None:
    changes, tolerance = WAYS[way]
    losers = stored(train(few(**changes)))
    without = drawn_by_diffusers(sd, LCMScheduler, 2, prompts_of(8), 3)
    assert (losers - wanted).abs().mean() < tolerance * (without - wanted).abs().mean()


def test_losers_of_a_trailing_euler(few: Settings, train: Train, sd: Path, lora: Path) -> None:
    """As Lightning and Hyper-SD are drawn, at a strength that is not the file's."""
    raw = few(**{"seppo.sampler": {"adapter": str(lora), "adapter_scale": 0.4, "solver": "euler", "steps": 2, "batch_size": 8,
                                   "spacing": "trailing", "samples_per_iteration": 8}})

    class Trailing(EulerDiscreteScheduler):
        @classmethod
        def from_config(cls, config: Any, **changes: Any) -> EulerDiscreteScheduler:
            return EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing", **changes)

    want = drawn_by_diffusers(sd, Trailing, 2, prompts_of(8), 3, lora, lora_scale=0.4)
    torch.testing.assert_close(stored(train(raw)), want, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_losers_of_a_flow_with_a_turbo_adapter(quantize: str | None, settings: Settings, train: Train, tmp_path: Path) -> None:
    """Over quantized layers, too, where it changes the losers as over plain ones."""
    sd3 = tiny_sd3(tmp_path / "sd3", num_layers=1, attention_head_dim=32, caption_projection_dim=64)  # nf4's blocks are of 64
    lora = write_lora(sd3, tmp_path / "turbo.safetensors", targets=("to_q", "add_v_proj"))

    def losers_with(adapter: Path | None) -> torch.Tensor:
        return stored(train(settings(**{**ONE,
            "seppo.model.path": str(sd3), "seppo.model.quantize": quantize, "seppo.model.lora": {"rank": 2},
            "seppo.output_dir": str(tmp_path / str(bool(adapter))), "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2,
            "seppo.sampler": {"adapter": adapter and str(adapter), "solver": "euler", "steps": 3, "guidance_scale": 1,
                              "batch_size": 4, "samples_per_iteration": 4}})))

    losers = losers_with(lora)
    pipeline = DiffusionPipeline.from_pretrained(sd3)
    pipeline.set_progress_bar_config(disable=True)
    noise = normal(losers.shape[1:], 3, "initial noise", range(4))

    def drawn() -> torch.Tensor:
        return pipeline(prompts_of(4), height=16, width=16, latents=noise.clone(), num_inference_steps=3, guidance_scale=1.0,
                        output_type="latent").images

    without = drawn()
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    changed, change = drawn() - without, losers - losers_with(None)
    assert (change - changed).abs().mean() < {None: 1e-3, "int8": 0.1, "nf4": 0.3}[quantize] * changed.abs().mean()


@pytest.mark.parametrize("limits", [{"guidance_interval": [0.2, 0.8]}, {"unconditional_every": 2}], ids=str)
def test_calls_are_counted_exactly_and_losers_are_plain(limits: dict[str, Any], settings: Settings, train: Train, sd: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated, drawing, forward, draw = [], [], UNet2DConditionModel.forward, Sampler.draw

    def counted(self: Any, latents: torch.Tensor, *given: Any, **named: Any) -> Any:
        evaluated.append(len(latents) if drawing else 0)
        return forward(self, latents, *given, **named)

    def watched(self: Any, *given: Any, **named: Any) -> Any:
        drawing.append(True)
        try:
            return draw(self, *given, **named)
        finally:
            drawing.clear()

    raw = settings(**ONE, **{"seppo.sampler": {"solver": "ddim", "steps": 5, "guidance_scale": 3.0, "batch_size": 8,
                                               "samples_per_iteration": 8, **limits}})
    config = parse_config(raw)
    cost = estimate(open_model(str(sd)), config, batch_plan(config.deepspeed, 1))
    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    monkeypatch.setattr(Sampler, "draw", watched)
    run = train(raw)
    assert sum(evaluated) * cost.forward == 8 * cost.sample < 8 * 2 * 5 * cost.forward
    if "guidance_interval" in limits:
        losers = drawn_by_diffusers(sd, DDIMScheduler, 5, prompts_of(8), 3,
                                    guidance=lambda level: 3.0 if 0.2 <= level <= 0.8 else 1.0)
        torch.testing.assert_close(stored(run), losers, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("changes", [{}, {"seppo.reference_score": "rollout", "seppo.sampler.window": "iteration"}], ids=str)
def test_what_scores_is_without_it(changes: dict[str, Any], settings: Settings, train: Train, lora: Path, tmp_path: Path) -> None:
    """The initial policy's errors on the winners are those of a run without an adapter, to the bit."""
    plain = train(settings(**ONE, **{"seppo.output_dir": str(tmp_path / "plain"), **changes}))
    with_it = train(settings(**ONE, **{f"seppo.sampler.{key}": value for key, value in
                                       {"adapter": str(lora), "solver": "tcd", "steps": 2, "guidance_scale": 1.0}.items()},
                             **changes))
    assert column(plain, "ref_mse_winner") == column(with_it, "ref_mse_winner")
    assert column(plain, "ref_mse_loser") != column(with_it, "ref_mse_loser")


def test_compiled_blocks_do_not_hide_it(few: Settings, train: Train, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are compiled for training and scoring are called with the adapter, too, where samples are drawn."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: compile_module(self, backend="eager"))
    run = train(few(**{"seppo.model.compile": "regional"}))
    assert (stored(run) - wanted).abs().max() < 2e-3


def test_ranks_and_a_killed_run(few: Settings, train: Train, forks: Forks, tmp_path: Path) -> None:
    changes = {"seppo.iterations": 2, "train_micro_batch_size_per_gpu": 2,
               "optimizer.params.eps": 1e-5, "seppo.beta": 300.0}
    alone = train(few(**changes, **{"seppo.output_dir": str(tmp_path / "alone")}))
    whole = few(**changes, **{"seppo.output_dir": str(tmp_path / "whole"), "seppo.sampler.batch_size": 4})
    assert forks.run(whole, ranks=2).statuses == [0, 0]
    assert apart(weights(alone), weights(tmp_path / "whole")) < 2e-5
    whole["seppo"]["output_dir"] = str(tmp_path / "killed")
    check_kill(forks, whole, tmp_path / "killed", tmp_path / "whole")


def test_another_adapter_on_resume_is_refused(few: Settings, train: Train, sd: Path, lora: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(lora, tmp_path / "own.safetensors"))
    raw = few(**{"seppo.sampler.adapter": str(own), "seppo.checkpoint.every": 1})
    train(raw)
    raw["seppo"]["iterations"] = 2
    write_lora(sd, own, seed=6)
    with pytest.raises(UserError, match="was trained with other weights than those that seppo.sampler.adapter has now"):
        train(raw, "auto")
    shutil.copy(lora, own)
    train(raw, "auto")


def test_a_checkpoint_of_before_the_keys_goes_on(settings: Settings, train: Train, tmp_path: Path) -> None:
    raw = settings(**{"seppo.checkpoint.every": 1, "seppo.iterations": 1})
    run = train(raw)
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    state = json.loads((checkpoint / "state.json").read_text())
    for key in ("spacing", "guidance_interval", "unconditional_every", "adapter"):
        del state["config"]["seppo"]["sampler"][key]
    for key in ("solver", "steps", "guidance_scale"):
        del state["config"]["seppo"]["samples"][key]
    (checkpoint / "state.json").write_text(json.dumps(state, indent=1))
    marker = json.loads((checkpoint / "complete.json").read_text())
    for name, file in marker["files"].items():
        if name == "state.json":
            file |= {"size": (checkpoint / name).stat().st_size, "xxh3_128": checksum(checkpoint / name)}
    (checkpoint / "complete.json").write_text(json.dumps(marker))
    raw["seppo"]["iterations"] = 2
    resumed = train(raw, "auto")
    assert len(column(resumed, "loss")) == 4
    raw["seppo"]["output_dir"] = str(tmp_path / "whole")
    assert identical(weights(train(raw)), weights(resumed))


def test_grids_show_the_policy_without_it(few: Settings, settings: Settings, train: Train, tmp_path: Path) -> None:
    grids = {"every": 2, "prompts": ["a handwritten two"], "per_prompt": 3}
    plain = train(settings(**ONE, **{"seppo.output_dir": str(tmp_path / "plain"), "seppo.samples": grids}))
    adapted = train(few(**{"seppo.samples": grids | SHOWN}))
    first = "update_00000000.png"
    assert (plain / "samples" / first).read_bytes() == (adapted / "samples" / first).read_bytes()


def test_held_out_measures_need_no_settings_of_grids(few: Settings, train: Train) -> None:
    run = train(few(**{"seppo.data.hold_out": 4, "seppo.evaluation": {"every": 2}}))
    assert [row["heldout_winner_gain"] for row in rows(run) if "heldout_winner_gain" in row][0] == 0


def test_the_card_says_what_drew_the_losers(few: Settings, train: Train, lora: Path) -> None:
    config = parse_config(raw := few())
    card = (train(raw) / "final" / "README.md").read_text()
    assert (f"Losers were drawn with the distillation LoRA `{lora}` (XXH3 {checksum(lora)}, scale 1) beside the past policies'"
            " weights: lcm, 2 steps, guidance 1.") in card
    adapter = read(config.seppo, open_model(config.seppo.model.path))
    assert adapter is not None and adapter.file == lora
