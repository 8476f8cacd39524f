"""The plan's FLOPs and bytes against what the real thing takes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import CLOSE, allocated
from diffusers import UNet2DConditionModel
from tiny import tiny_animatediff, tiny_sd
from tiny import unet as tiny_unet
from torch import nn
from torch.nn import functional
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

from seppo_fast.config import Lora
from seppo_fast.configfile import batch_plan, load_config, parse_config
from seppo_fast.models import open_model
from seppo_fast.models.lora import add_lora
from seppo_fast.models.published import published_model
from seppo_fast.planning.cost import Cost, estimate
from seppo_fast.planning.encoders import vae_bytes
from seppo_fast.planning.network_memory import fused_attention, inference, micro_batch
from seppo_fast.training import zero_linear
from seppo_fast.training.engine import precision, start_engine

pytestmark = pytest.mark.slow

def network(device: str, dtype: torch.dtype, checkpointing: bool = False, lora: bool = False) -> nn.Module:
    """Two levels with attention on both, for 16x16 latents."""
    with torch.device(device):
        unet = tiny_unet(block_out_channels=(64, 128), down_block_types=("CrossAttnDownBlock2D",) * 2,
                         up_block_types=("CrossAttnUpBlock2D",) * 2, sample_size=16)
    nn.Module.to(unet, dtype)
    if lora:
        add_lora(unet, Lora(rank=4), 0)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train()


def call(unet: nn.Module, device: str, dtype: torch.dtype, samples: int = 4) -> torch.Tensor:
    made = {"device": device, "dtype": dtype}
    timesteps = torch.zeros(samples, device=device, dtype=torch.long)
    return unet(torch.zeros(samples, 4, 16, 16, **made), timesteps, torch.zeros(samples, 77, 32, **made), return_dict=False)[0]


@pytest.mark.parametrize(("dtype", "checkpointing", "lora", "kept"), [
    (torch.float32, False, False, True), (torch.float32, True, True, True), (torch.bfloat16, False, False, False),
    (torch.bfloat16, True, False, False), (torch.bfloat16, False, True, True),
])
def test_activations_and_gradients_are_what_the_cpu_allocates(dtype: torch.dtype, checkpointing: bool, lora: bool,
                                                              kept: bool) -> None:
    def take(weight: nn.Parameter) -> None:
        if not kept:
            weight.grad = None

    def really() -> None:
        hooks = [weight.register_post_accumulate_grad_hook(take) for weight in real.parameters() if weight.requires_grad]
        prediction = call(real, "cpu", dtype)
        with torch.no_grad():
            call(real, "cpu", dtype)
        prediction.backward(torch.zeros_like(prediction))
        for hook in hooks:
            hook.remove()

    planned, real = (network(device, dtype, checkpointing, lora) for device in ("meta", "cpu"))
    estimated = micro_batch(planned, lambda: call(planned, "meta", dtype), reference=True, gradient=take).peak
    assert estimated == pytest.approx(allocated(really), rel=CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="a processor that has no bf16 convolves in fp32 scratch"))])
def test_a_forward_is_what_the_cpu_allocates(dtype: torch.dtype) -> None:
    planned, real = (network(device, dtype) for device in ("meta", "cpu"))

    def really() -> None:
        with torch.no_grad():
            call(real, "cpu", dtype)

    estimated = inference(lambda: call(planned, "meta", dtype)).peak
    assert estimated == pytest.approx(allocated(really), rel=CLOSE)


@pytest.mark.parametrize("video", [False, True])
def test_decoding_is_what_the_cpu_allocates(video: bool, sd: Path, tmp_path: Path) -> None:
    """With the VAE's weights: of an image, and of a clip's frames together."""
    model = open_model(str(tiny_animatediff(tmp_path) if video else sd))
    shape = (4, 8, 24, 24) if video else (4, 24, 24)

    def really() -> None:
        vae = copy.deepcopy(loaded)
        kept.extend((vae, model.decode(vae, torch.zeros(1, *shape))))

    loaded, kept = model.load_vae("cpu"), []
    assert sum(vae_bytes(model, shape)) == pytest.approx(allocated(really), rel=CLOSE)


def test_flops_are_those_of_pytorchs_counter() -> None:
    unet = network("meta", torch.float32)
    with FlopCounterMode(display=False) as counter, fused_attention():
        call(unet, "meta", torch.float32, 1).sum().backward()
    meter = micro_batch(unet, lambda: call(unet, "meta", torch.float32, 1), reference=False, gradient=lambda weight: None)
    assert meter.flops == counter.get_total_flops() > 0


BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
ENGINES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 zero 1": BF16 | {"zero_optimization": {"stage": 1}},
    "bf16 zero 1, the shipped settings": BF16 | {"zero_optimization": {"stage": 1}, "communication_data_type": "fp32",
                                                 "bf16": {"enabled": True, "immediate_grad_update": True}},
    "bf16 zero 2": BF16 | {"zero_optimization": {"stage": 2, "reduce_bucket_size": 200_000}},
    "bf16 zero 3": BF16 | {"zero_optimization": {"stage": 3, "reduce_bucket_size": 200_000}},
}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than elsewhere: beside its tensors, what is allocated for other things is little."""
    return tiny_sd(tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture(scope="module")
def engines() -> list[Any]:
    """Those of the tests before."""
    return []


@pytest.mark.parametrize("engine", ENGINES)
def test_the_memory_of_a_run_is_what_the_cpu_allocates(engine: str, settings: Callable[..., dict[str, Any]], sd: Path,
                                                       ranks: Any, engines: list[Any]) -> None:
    """Two accumulation windows, from the weights on, with policy, reference, DeepSpeed's engine and a fused AdamW."""
    config = parse_config(settings(train_batch_size=2, train_micro_batch_size_per_gpu=1, **ENGINES[engine],
                                   **{"optimizer.params.fused": True, "seppo.sampler.cuda_graph": False}))
    batch = batch_plan(config.deepspeed, ranks.world)
    model, dtype = open_model(str(sd)), precision(config.deepspeed).dtype

    def really() -> None:
        policy, reference = (model.load_denoiser(dtype) for _ in range(2))
        started = start_engine(policy.train(), config, batch)
        engines.append(started)  # else it would be freed while the next one is measured
        for _ in range(2 * batch.accumulation):
            latents = torch.zeros(2, 4, 8, 8, dtype=dtype)
            given = latents, torch.zeros(2, dtype=torch.long), {"prompt_embeds": torch.zeros(2, 77, 32, dtype=dtype)}
            prediction = model.denoise(started, *given)
            with torch.no_grad():
                target = model.denoise(reference, *given)
            started.backward(mse_loss(prediction.float(), target.float()))
            started.step()

    assert estimate(model, config, batch).memory == pytest.approx(allocated(really), rel=CLOSE)


def test_zero_3_keeps_the_inputs_of_frozen_layers_and_later_runs_do_not(small: Callable[..., Cost], settings: Callable[..., Any],
                                                                         ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed replaces PyTorch's function for linear layers by one of its own, and leaves that to the process."""
    lora = BF16 | {"seppo.model.lora": {"rank": 4}}
    first, third = (lora | {"zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}} for stage in (1, 3))
    before = small(**first).activations
    assert small(**third).activations > 1.1 * before
    own = functional.linear
    monkeypatch.setattr(functional, "linear", own)  # as it was, in the end
    config = parse_config(settings(**BF16 | {"zero_optimization": {"stage": 3}}))
    start_engine(nn.Linear(8, 8).bfloat16(), config, batch_plan(config.deepspeed, ranks.world))
    assert functional.linear is not zero_linear.plain(), "if not, DeepSpeed has mended it, and zero_linear.py can go"
    assert small(**first).activations == before
    config = parse_config(settings(**BF16 | {"zero_optimization": {"stage": 1}}))
    start_engine(nn.Linear(8, 8).bfloat16(), config, batch_plan(config.deepspeed, ranks.world))
    assert functional.linear is zero_linear.plain()


@pytest.fixture(scope="module")
def planned() -> Callable[..., Cost]:
    def plan(world: int, *overrides: str) -> Cost:
        config = load_config("ds_a100.json", ["train_micro_batch_size_per_gpu=1", *overrides])
        return estimate(published_model(config.seppo.model.path), config, batch_plan(config.deepspeed, world))

    return plan


def test_stable_diffusion_15(planned: Callable[..., Cost]) -> None:
    cost = planned(1, "zero_optimization.stage=2", "seppo.sampler.batch_size=16")
    assert cost.parameters == cost.trained == 859_520_964
    assert cost.forward == pytest.approx(0.803e12, rel=1e-3)
    assert cost.sampling == pytest.approx(80.3e12, rel=1e-3) and cost.sampling_share > 0.9
    assert cost.memory < cost.reserved < 24e9  # full fine-tuning, local batch 1, bf16, one GPU


def test_stable_diffusion_15_with_checkpointing_and_the_optimizer_on_the_cpu(planned: Callable[..., Cost]) -> None:
    cost = planned(1, "zero_optimization.stage=2", 'zero_optimization.offload_optimizer={"device": "cpu"}',
                   "seppo.model.gradient_checkpointing=true", "seppo.sampler.batch_size=16")
    assert cost.memory < cost.reserved < 12e9


def test_a_reference_that_rests_is_there_for_sampling_alone(planned: Callable[..., Cost]) -> None:
    stays, rests = (planned(1, "seppo.reference_score=rollout", "seppo.sampler.batch_size=2", f"seppo.sampler.window={window}")
                    for window in ("update", "iteration"))
    for phase in ("micro-batch", "optimizer"):
        assert stays.peaks[phase] - rests.peaks[phase] == stays.reference == 2 * 859_520_964
    assert rests.peaks["sampling"] == stays.peaks["sampling"]
    assert rests.peaks["sample grid"] == stays.peaks["sample grid"] + stays.sampler, "the graph is in the one, beside the other"
    assert rests.reserved == rests.memory < stays.reserved, "its graph goes with it"
    assert stays.peaks["sampling"] > stays.standing + stays.sampler + stays.score > stays.standing + stays.sampler, "scores, too"


def test_an_improvement_model_that_rests_takes_its_graph_along() -> None:
    stays, rests = (estimate(published_model(config.seppo.model.path), config, batch_plan(config.deepspeed, 8)) for config in (
        load_config("ds_a100_iterative_dpo.json", [f"seppo.improvement.offload={offload}", "seppo.sampler.batch_size=1"])
        for offload in ("false", "true")))
    assert stays.peaks["sampling"] == rests.peaks["sampling"] > stays.standing + stays.sampler + stays.improving
    assert stays.improving > stays.sampler > 0, "three branches, not two"
    assert stays.reserved - rests.reserved == stays.improver + stays.improving


def test_the_published_shapes() -> None:
    for path, parameters in (("runwayml/stable-diffusion-v1-5", 859_520_964),
                             ("stabilityai/stable-diffusion-xl-base-1.0", 2_567_463_684)):
        model = published_model(path)
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(model.directory.configs["unet"]))
        assert sum(weight.numel() for weight in unet.parameters()) == parameters
        assert (model.latent_channels, model.vae_scale_factor) == (4, 8)
    assert published_model("someone/something-else") is None


@pytest.fixture
def small(settings: Callable[..., dict[str, Any]], sd: Path) -> Callable[..., Cost]:
    def plan(**changes: Any) -> Cost:
        config = parse_config(settings(**changes))
        return estimate(open_model(str(sd)), config, batch_plan(config.deepspeed, 1))

    return plan


def test_channels_last_is_in_the_plan(small: Callable[..., Cost]) -> None:
    """Where a resnet's shortcut convolves what its norm keeps, both layouts of it are kept for backward."""
    contiguous, last = (small(**{"seppo.model.channels_last": value}) for value in (False, True))
    assert contiguous.activations < last.activations < 1.2 * contiguous.activations
    assert contiguous.forward == last.forward


def test_further_noises_of_a_sign_are_in_the_plan(small: Callable[..., Cost]) -> None:
    """Policy and reference answer once more for each, on the winner alone."""
    one, four = small(), small(**{"seppo.aaf_draws": 4})
    assert four.pair - one.pair == pytest.approx(3 * 2 * one.forward, rel=1e-12)
    assert four.scoring - one.scoring == four.training - one.training == pytest.approx(3 * one.forward, rel=1e-12)
    assert four.peaks == one.peaks


def test_grids_and_evaluations_are_in_the_plan(small: Callable[..., Cost]) -> None:
    """One sample in the VAE's fp32, beside what stays between updates; sampling for them counts without losers, too."""
    evaluation = {"seppo.evaluation.every": 1, "seppo.evaluation.prompts": ["a cat"]}
    grids = {"seppo.samples.every": 1, "seppo.samples.prompts": []}
    both, looks, none = small(**evaluation, **grids), small(**grids), small(**{"seppo.samples.every": 0})
    assert "sample grid" not in none.peaks and set(both.peaks) - set(looks.peaks) == {"evaluation"}
    assert both.peaks["evaluation"] == both.peaks["sample grid"] == looks.standing + looks.kept_gradients + looks.grid
    plain = small(**evaluation, **grids, **{"seppo.sampler.cuda_graph": False, "seppo.sampler.batch_size": 64})
    assert plain.evaluation > plain.grid == both.grid, "its network draws beside the VAE"
    sft = {"seppo.method": "sft", "seppo.sampler.batch_size": 64}
    fixed, blind = small(**grids, **sft), small(**sft, **{"seppo.samples.every": 0})
    assert 0 < fixed.sampler < plain.sampler and fixed.sampling == blind.sampler == 0
    assert "sampling" in fixed.peaks and "sampling" not in blind.peaks


def test_the_recipe_for_24_gb() -> None:
    config = load_config("ds_24gb.json")
    cost = estimate(published_model(config.seppo.model.path), config, batch_plan(config.deepspeed, 1))
    assert cost.memory < cost.reserved < 16e9, "of 25.8e9, for the driver, workspaces and the allocator need some"
