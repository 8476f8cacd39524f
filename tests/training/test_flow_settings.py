"""What a flow transformer does not go with is said before anything is loaded or written; what it goes with works."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from outcomes import apart, rows
from safetensors.torch import load_file
from tiny import tiny_flux, tiny_sd3
from tiny_qwen import tiny_qwen

from seppo_fast.compiler import transformer_blocks
from seppo_fast.config import Model
from seppo_fast.configfile import parse_config
from seppo_fast.errors import UserError
from seppo_fast.evaluate import parse_arguments
from seppo_fast.evaluation.arguments import dtype_of, request_of
from seppo_fast.evaluation.candidates import open_candidates
from seppo_fast.models import open_model
from seppo_fast.models.prepare import prepare_denoisers
from seppo_fast.models.trial import block_inputs, call_once
from seppo_fast.planning.dry_run import dry_run

TRANSFORMERS = ("sd3", "flux", "schnell", "patches")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny directories; "schnell" has no guidance embedding, "patches" has patches of 16 pixels."""
    root = tmp_path_factory.mktemp("models")
    return {"sd3": tiny_sd3(root / "sd3"), "flux": tiny_flux(root / "flux"),
            "schnell": tiny_flux(root / "schnell", dynamic=False, guidance_embeds=False),
            "patches": tiny_sd3(root / "patches", patch_size=8), "qwen": tiny_qwen(root / "qwen")}


@pytest.fixture
def of(settings: Any, models: dict[str, Path]) -> Any:
    """`of(name, **changes)`: a configuration for one of `models`."""
    return lambda name, **changes: settings(**{"seppo.model.path": str(models[name]), "seppo.sampler.solver": "euler",
                                               "train_batch_size": 2, "train_micro_batch_size_per_gpu": 2,
                                               "seppo.sampler.steps": 2, **changes})


REFUSED = [
    ("sd3", {"fp16.enabled": True}, "fp16.enabled: .*/sd3 is a StableDiffusion3Pipeline, whose networks overflow in fp16.* bf16"),
    ("flux", {"fp16.enabled": True}, "fp16.enabled: .*/flux is a FluxPipeline"),
    ("qwen", {"fp16.enabled": True}, "fp16.enabled: .*/qwen is a QwenImagePipeline, whose networks overflow in fp16.* bf16"),
    ("qwen", {"seppo.sampler.fuse_projections": True}, "seppo.sampler.fuse_projections: the projections of .* of .*/qwen"),
    ("qwen", {"seppo.sampler.solver": "dpmsolver++"}, "seppo.sampler.solver: 'dpmsolver\\+\\+' does not know the shift_terminal"),
    ("schnell", {"seppo.sampler.guidance_scale": 3.5}, "seppo.sampler.guidance_scale: 3.5 has no effect on .*/schnell"),
    ("sd3", {"seppo.model.attention": "xformers"}, "seppo.model.attention: the transformer of .*/sd3 has no \"xformers\""),
    ("flux", {"seppo.sampler.fuse_projections": True}, "seppo.sampler.fuse_projections: the projections of .* of .*/flux"),
    ("patches", {"seppo.data.resolution": 24}, "seppo.data.resolution=24 is no multiple of 16, as .*/patches needs it"),
    ("sd3", {"seppo.data.resolution": 40}, "images of 40 pixels are larger than its transformer can place: at most 32"),
    ("flux", {"seppo.sampler.solver": "ddim"}, "seppo.sampler.solver: 'ddim' is for DDPM-like models"),
    ("sd3", {"seppo.model.motion_adapter": "/nowhere"}, "motion adapters go with Stable Diffusion 1.x"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_refused_in_a_dry_run_and_in_a_run(name: str, changes: Any, message: str, of: Any, train: Any, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported", lambda self: True)
    raw = of(name, **changes)
    for run in (lambda: dry_run(parse_config(raw), 1), lambda: train(raw)):
        with pytest.raises(UserError, match=message):
            run()
    assert not (tmp_path / "run" / "run.json").exists()


def test_methods_of_improvement_models(of: Any, pickapic: Path, improvement: Path) -> None:
    changes = {"seppo.method": "improvement", "seppo.data.source": str(pickapic)}
    with pytest.raises(UserError, match="an improvement model is an InstructPix2Pix model"):
        dry_run(parse_config(of("sd3", **changes)), 1)
    changes = {"seppo.method": "iterative_dpo", "seppo.improvement.path": str(improvement)}
    with pytest.raises(UserError, match="does not fit the policy's model .*: its kind is 'sd' and not 'sd3'; "):
        dry_run(parse_config(of("sd3", **changes)), 1)


def test_another_reference_of_the_same_architecture(of: Any, models: dict[str, Path], train: Any, tmp_path: Path) -> None:
    other = shutil.copytree(models["sd3"], tmp_path / "other")
    torch.manual_seed(5)
    SD3Transformer2DModel.from_config(json.loads((other / "transformer" / "config.json").read_text())
                                      ).save_pretrained(other / "transformer")
    run = train(of("sd3", **{"seppo.method": "ditto", "seppo.reference_model.path": str(other), "seppo.iterations": 1}))
    assert rows(run)[0]["ref_mse_winner"] != pytest.approx(rows(run)[0]["model_mse_winner"], rel=1e-3)


def arguments(model: Path, *given: str) -> Any:
    return parse_arguments(["--models", f"base={model}", "--prompts", "/nowhere", "--out", "/nowhere", *given])


def test_evaluation_in_a_precision_that_overflows(models: dict[str, Path], sd: Path, ranks: Any) -> None:
    with pytest.raises(UserError, match="--dtype float16: the networks of .*/sd3 overflow in it; use bfloat16 or float32"):
        request_of(arguments(models["sd3"], "--dtype", "float16"), ranks, print)
    flow, image = open_candidates([f"flow={models['flux']}", f"image={sd}"], None, None, 1)
    assert [dtype_of("auto", torch.device("cuda"), given) for given in ([image], [flow], [image, flow])] == [
        torch.float16, torch.bfloat16, torch.bfloat16]


def test_evaluation_at_a_guidance_scale_without_effect(models: dict[str, Path], ranks: Any) -> None:
    with pytest.raises(UserError, match="--guidance-scale: 7.5 has no effect on .*/schnell"):
        request_of(arguments(models["schnell"], "--resolution", "16"), ranks, print)


CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_blocks_are_compiled_one_by_one(name: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, differentiated and taken apart; test_prepare makes kernels."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **_: compile(block, backend="aot_eager"))
    model = open_model(str(models[name]))
    network = model.load_denoiser(torch.float32)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        random = torch.Generator().manual_seed(0)
        conditions = {key: torch.randn(1, *shape, generator=random) for key, shape in model.condition_shapes.items()}
        latents = torch.randn(1, 4, 8, 8, generator=random)
        model.denoise(network, latents, torch.tensor([300.0]), conditions).square().mean().backward()
        return [weight.grad for weight in network.parameters() if weight.grad is not None]

    plain = gradients()
    prepare_denoisers([network], Model(path="x", compile="regional"), (8, 8), torch.float32, CPU, lambda line: None,
                      inputs=lambda dtype: block_inputs(model.empty_denoiser, lambda net: call_once(model, net), dtype))
    blocks = transformer_blocks(network)
    assert len(blocks) == 2 and all(block._compiled_call_impl is not None for block in blocks)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for got, wanted in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


def policy_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir()) / "policy.safetensors")


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen"])
def test_checkpointed_activations_change_nothing(name: str, of: Any, train: Any, tmp_path: Path) -> None:
    one, other = (train(of(name, **{"seppo.iterations": 1, "seppo.model.gradient_checkpointing": on,
                                    "seppo.output_dir": str(tmp_path / str(on)), "optimizer.params.eps": 1e-5}))
                  for on in (False, True))
    assert apart(policy_of(one), policy_of(other)) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), [("sd3", "regional"), ("flux", "full")])
def test_a_compiled_sampler_draws_the_same(name: str, how: str, of: Any, train: Any, tmp_path: Path, quick_compiler: None) -> None:
    plain, compiled = (train(of(name, **{"seppo.iterations": 1, "seppo.updates_per_iteration": 1, "seppo.sampler.compile": given,
                                         "seppo.output_dir": str(tmp_path / given)})) for given in ("none", how))
    for key in ("loss", "model_mse_loser"):
        assert rows(compiled)[0][key] == pytest.approx(rows(plain)[0][key], rel=1e-3)
