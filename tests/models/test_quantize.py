"""Frozen weights in 8 or 4 bits: which ones, what policy and reference share, what DeepSpeed sees, what is refused."""

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from tiny import tiny_sd3
from torch import nn

from seppo_fast.config import Lora
from seppo_fast.configfile import batch_plan, parse_config
from seppo_fast.errors import UserError
from seppo_fast.models import Model, open_model
from seppo_fast.models.lora import add_lora, copy_beside, trainable_weights
from seppo_fast.models.quantize import chosen, is_quantized, lacking, quantize, without_quantized
from seppo_fast.models.trial import blank_conditions
from seppo_fast.reference.cuda_graph import fingerprint
from seppo_fast.training.engine import check_engine_config, unsupported
from seppo_fast.training.networks import check_network
from seppo_fast.training.zero_linear import linear_of

ERRORS = {"int8": 0.02, "fp8": 0.06, "nf4": 0.2}  # of a random network's output, relative; 0.004, 0.02, 0.1 were seen
WIDE = {"attention_head_dim": 32, "caption_projection_dim": 64, "num_layers": 1}  # layers of 64, so that nf4's blocks are full
kinds = pytest.mark.parametrize("kind", ERRORS)


@pytest.fixture(autouse=True)
def plain_linear() -> Iterator[None]:
    """Whatever ran in this process before."""
    with linear_of({}):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("models") / "sd3", **WIDE)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return open_model(str(folder))


def predict(model: Model, network: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    conditions = {name: value + 0.5 for name, value in blank_conditions(model, latents).items()}
    return model.denoise(network, latents, torch.tensor([100.0, 700.0]), conditions)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_base_computes_nearly_the_same_and_only_the_adapter_is_trained(kind: str, dtype: torch.dtype, model: Model
                                                                                   ) -> None:
    network = model.load_denoiser(dtype)
    plain = predict(model, network, dtype)
    linear = {f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    quantize(network, kind, "cpu", dtype)
    assert {name for name, weight in network.named_parameters() if is_quantized(weight)} == linear
    assert 0 < ((predict(model, network, dtype) - plain).norm() / plain.norm()).item() < ERRORS[kind]
    add_lora(network.train(), Lora(rank=4), seed=1)
    trained = trainable_weights(network)
    assert trained and {weight.dtype for weight in trained.values()} == {dtype} and all(".lora_" in name for name in trained)
    predict(model, network, dtype).float().square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained.values())
    assert sum(weight.grad.abs().sum() for weight in trained.values()) > 0
    bare = model.load_denoiser(dtype)
    add_lora(bare, Lora(rank=4), seed=1)
    assert trainable_weights(bare).keys() == trained.keys()
    assert all(torch.equal(weight, trained[name]) for name, weight in trainable_weights(bare).items())


@kinds
def test_policy_and_reference_hold_one_base(kind: str, model: Model) -> None:
    policy = model.load_denoiser(torch.float32)
    quantize(policy, kind, "cpu", torch.float32)
    add_lora(policy, Lora(rank=4), seed=1)
    reference = copy_beside(policy, shares=True)
    own = dict(reference.named_parameters())
    assert [*own] == [name for name, _ in policy.named_parameters()]
    for name, weight in policy.named_parameters():
        assert (own[name] is weight) == (not weight.requires_grad), name
    for name, layer in policy.named_modules():  # bitsandbytes' layers
        assert getattr(reference.get_submodule(name), "quant_state", None) is getattr(layer, "quant_state", None), name
    before = predict(model, reference)
    with torch.no_grad():
        for weight in trainable_weights(policy).values():
            weight.add_(0.1)
    assert torch.equal(predict(model, reference), before) and not torch.equal(predict(model, policy), before)
    reference.eval().to("cpu")  # in inference some kernels would pack the shared weights anew
    with torch.no_grad():
        assert torch.equal(predict(model, reference), before)


@kinds
def test_a_graph_sees_where_quantized_weights_are(kind: str, model: Model) -> None:
    network = model.load_denoiser(torch.float32)
    quantize(network, kind, "cpu", torch.float32)
    same = fingerprint(network)
    assert fingerprint(network) == same
    layer = next(iter(chosen(network).values()))
    layer.weight = copy.deepcopy(layer.weight)
    assert fingerprint(network) != same


@kinds
def test_deepspeed_sees_no_quantized_weight(kind: str, model: Model) -> None:
    network = model.load_denoiser(torch.float32)
    quantize(network, kind, "cpu", torch.float32)
    before = [(name, id(weight)) for name, weight in network.named_parameters()]
    with without_quantized(network):
        assert not any(is_quantized(weight) for weight in network.parameters())
        assert not any("weight." in name for name in network.state_dict()), "nor scales"
    assert [(name, id(weight)) for name, weight in network.named_parameters()] == before


def test_what_a_class_keeps_in_fp32_and_tied_weights_are_not_quantized() -> None:
    network = nn.ModuleDict({"embedding": nn.Embedding(8, 64), "head": nn.Linear(64, 8), "wo": nn.Linear(64, 64),
                             "inner": nn.Linear(64, 64)})
    network["head"].weight = network["embedding"].weight
    network._keep_in_fp32_modules = ["wo"]
    assert [*chosen(network)] == ["inner"]


@kinds
def test_text_encoders_are_quantized_as_asked(kind: str, folder: Path, model: Model) -> None:
    seen: dict[str, nn.Module] = {}
    quantized = open_model(str(folder), quantize_text=kind)
    found = quantized.load_text("cpu", adapt=lambda part, encoder: seen.update({part: encoder}))(["a red cat"])
    plain = model.load_text("cpu")(["a red cat"])
    rounded = model.load_text("cpu", adapt=lambda part, encoder: round_as(seen[part], encoder))(["a red cat"])
    for name, value in found.items():
        assert ((value - rounded[name]).norm() / rounded[name].norm()).item() < 1e-3, name
        assert ((value - plain[name]).norm() / plain[name].norm()).item() > 1e-4, name
    assert len(seen) == 3 and all(any(map(is_quantized, encoder.parameters())) for encoder in seen.values())
    assert not any(is_quantized(weight) for name, weight in seen["text_encoder_3"].named_parameters() if ".wo." in name)


@torch.no_grad()
def round_as(quantized: nn.Module, plain: nn.Module) -> None:
    """Give plain weights the values that the quantized ones stand for."""
    of = dict(quantized.named_parameters())
    for name, weight in plain.named_parameters():
        if is_quantized(of[name]):
            state = getattr(of[name], "quant_state", None)
            weight.copy_(of[name].dequantize() if state is None else dequantize_4bit(of[name], state))


Settings = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(("changes", "said"), [
    ({"seppo.model.quantize": "nf4"}, "quantize='nf4' needs lora"),
    ({"seppo.model.quantize": "int4", "seppo.model.lora": {}}, "seppo.model.quantize"),
])
def test_a_configuration_is_refused(changes: dict[str, Any], said: str, settings: Settings) -> None:
    with pytest.raises(UserError, match=said):
        parse_config(settings(**changes))


def test_partitioned_weights_are_not_quantized(settings: Settings) -> None:
    config = parse_config(settings(**{"seppo.model.quantize": "int8", "seppo.model.lora": {}, "zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError, match="seppo.model.quantize: 'int8' does not go with zero_optimization.stage 3"):
        check_engine_config(config, batch_plan(config.deepspeed, 1))


def test_zero_3_has_linear_layers_of_its_own(settings: Settings) -> None:
    changes = {"seppo.model.quantize_text": "fp8", "zero_optimization": {"stage": 3}}
    config = parse_config(settings(**changes))
    with pytest.raises(UserError, match="seppo.model.quantize_text: ZeRO-3 .*memory_efficient_linear to false, or take"):
        check_engine_config(config, batch_plan(config.deepspeed, 1))
    changes["zero_optimization"]["memory_efficient_linear"] = False
    check_engine_config(parse_config(settings(**changes)), batch_plan(config.deepspeed, 1))


def test_an_earlier_run_with_zero_3_does_not_matter(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", zero3_linear_wrap)  # DeepSpeed leaves it there
        patch.setattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", torch._C._nn.linear, raising=False)
        assert unsupported(parse_config(settings(**{"seppo.model.quantize": "int8", "seppo.model.lora": {}}))) is None


def test_int8_sums_overflow_in_fp16(settings: Settings, sd: Path) -> None:
    config = parse_config(settings(**{"seppo.model.quantize": "int8", "seppo.model.lora": {}, "fp16": {"enabled": True}}))
    with pytest.raises(UserError, match='seppo.model.quantize: "int8" overflows in fp16'):
        check_network(open_model(str(sd)), config)


@pytest.mark.parametrize(("component", "method"), [("transformer", "bitsandbytes"), ("text_encoder_3", "torchao")])
def test_weights_that_are_quantized_already(component: str, method: str, tmp_path: Path) -> None:
    file = tiny_sd3(tmp_path / "sd3", **WIDE) / component / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": None}))
    open_model(str(tmp_path / "sd3"))
    file.write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=rf"{component}/config.json: quantization_config .*already \({method}\).*quantized twice"):
        open_model(str(tmp_path / "sd3"))


def test_a_half_downloaded_model_gives_the_same_message(folder: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder, tmp_path / "sd3") / "transformer"
    open_model(str(folder)).load_denoiser(torch.float32).save_pretrained(place, max_shard_size="50KB")
    (place / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    max(place.glob("*-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"index.json lists \d+ shards, of which 1 are missing.*fetch the model again"):
        open_model(str(tmp_path / "sd3"), quantize_text="int8")


@kinds
def test_a_missing_package_is_a_message(kind: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    package = "bitsandbytes" if kind == "nf4" else "torchao"
    monkeypatch.setitem(sys.modules, package, None)
    for key in ("quantize", "quantize_text"):
        said = unsupported(parse_config(settings(**{f"seppo.model.{key}": kind, "seppo.model.lora": {}})))
        assert said.startswith(f"seppo.model.{key}: quantization to {kind} needs the package {package}, which is not here")
        assert said.endswith("pip install 'seppo-fast[quantize]'")


@kinds
def test_what_works_on_this_processor(kind: str) -> None:
    assert [lacking(kind, torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16)] == [None, None]


def test_a_device_without_fp8_and_a_kernel_that_fails_are_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert lacking("fp8", torch.device("cuda"), torch.bfloat16).startswith("NVIDIA A100 has no fp8 (compute capability 8.0")
    broken = lacking("nf4", torch.device("meta"), torch.float32)  # bitsandbytes has no kernels there
    assert broken.startswith("bitsandbytes cannot train on this meta (")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@kinds
def test_it_trains_on_this_gpu(kind: str) -> None:
    device = torch.device("cuda")
    said = lacking(kind, device, torch.bfloat16)
    assert said is None or kind == "fp8" and torch.cuda.get_device_capability() < (8, 9), said
