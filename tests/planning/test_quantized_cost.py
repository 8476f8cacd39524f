"""The plan's bytes of a base in 8 or 4 bits against what the CPU really takes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from allocations import CLOSE, allocated
from planning.test_transformer_cost import both, call, network, small
from tiny import tiny_sd3
from torch import nn

from seppo_fast.config import Lora
from seppo_fast.configfile import load_config
from seppo_fast.models import open_model
from seppo_fast.models.lora import add_lora, copy_beside, share_frozen
from seppo_fast.models.quantize import parts, quantize
from seppo_fast.planning.cost import network_bytes
from seppo_fast.planning.dry_run import dry_run
from seppo_fast.planning.encoders import text_bytes
from seppo_fast.planning.network_memory import micro_batch
from seppo_fast.planning.quantized import as_quantized
from seppo_fast.training.zero_linear import linear_of

pytestmark = pytest.mark.slow

kinds = pytest.mark.parametrize("kind", ["int8", "nf4", "fp8"])


@pytest.fixture(autouse=True)
def plain_linear() -> Iterator[None]:
    """Whatever ran in this process before."""
    with linear_of({}):
        yield


def held(*networks: nn.Module) -> int:
    """Bytes of all storages that the networks have."""
    tensors = [part for each in networks for tensor in (*each.parameters(), *each.buffers()) for part in parts(tensor)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@both
@kinds
def test_the_bytes_are_those_of_one_quantized_base_and_two_adapters(kind: str, pipeline: str) -> None:
    model = small(pipeline)
    policy, planned = (network(model, device, torch.bfloat16) for device in ("cpu", "meta"))
    plain, saved = network_bytes(planned), as_quantized(planned, kind)
    quantize(policy, kind, "cpu", torch.bfloat16)
    for each in (policy, planned):
        add_lora(each, Lora(rank=4), 0)
    adapter = network_bytes(planned, shared=True)
    reference = copy_beside(policy, shares=True)
    share_frozen(reference, policy)
    assert held(policy, reference) == pytest.approx(network_bytes(planned) - saved + adapter, rel=0.001)
    assert plain - saved < {"int8": 0.7, "fp8": 0.7, "nf4": 0.45}[kind] * plain


@both
@kinds
@pytest.mark.parametrize(("dtype", "checkpointing"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_activations_and_unpacked_weights_are_what_the_cpu_allocates(kind: str, pipeline: str, dtype: torch.dtype,
                                                                     checkpointing: bool) -> None:
    def really() -> None:
        prediction = call(model, real, "cpu", dtype)
        with torch.no_grad():
            call(model, real, "cpu", dtype)
        prediction.backward(torch.zeros_like(prediction))

    model = small(pipeline)
    real, planned = (network(model, device, dtype) for device in ("cpu", "meta"))
    quantize(real, kind, "cpu", dtype)
    as_quantized(planned, kind)
    for each in (real, planned):
        add_lora(each, Lora(rank=4), 0)
        if checkpointing:
            each.enable_gradient_checkpointing()
    estimated = micro_batch(planned, lambda: call(model, planned, "meta", dtype), reference=True, gradient=lambda weight: None)
    assert estimated.peak == pytest.approx(allocated(really), rel=CLOSE)


@kinds
def test_text_encoders_are_counted_as_they_are_stored(kind: str, tmp_path: Path) -> None:
    """T5's `wo` stays in fp32; of embeddings and tables nothing changes."""
    model, loaded = open_model(str(tiny_sd3(tmp_path / "sd3")), quantize_text=kind), []
    model.load_text("cpu", adapt=lambda part, encoder: loaded.append(encoder))
    assert text_bytes(model, 1, kind)[0] == pytest.approx(held(*loaded), rel=0.02)
    assert text_bytes(model, 1, kind)[0] < 0.8 * text_bytes(model, 1)[0]


def test_a_dry_run_counts_the_smaller_base(tmp_path: Path) -> None:
    """FLUX.1-dev, whose 11.9 B weights are 23.8 GB in bf16; without the packages and without a download."""
    plans = {}
    for kind in ("null", "int8", "nf4"):
        plans[kind] = dry_run(load_config("ds_a100_flux.json", [f"seppo.output_dir={tmp_path / 'run'}",
                                                                f"seppo.model.quantize={kind}"]), 8)
    sizes = {kind: float(plan.split("weights ")[-1].split(" GB")[0]) for kind, plan in plans.items()}
    assert sizes["null"] == pytest.approx(24.0, abs=0.2)
    assert sizes["int8"] == pytest.approx(12.1, abs=0.3) and sizes["nf4"] == pytest.approx(6.9, abs=0.3)
    assert "over weights in nf4" in plans["nf4"] and "over weights" not in plans["null"]
