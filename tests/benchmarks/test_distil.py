"""A few-step adapter made of a tiny base: the same to the bit each time, and one that diffusers reads."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from tiny import LATENTS, PIXELS, tiny_sd, tiny_sd3

from benchmarks.time_to_quality import distil as distillation
from benchmarks.time_to_quality.distil import FLOW, UNET, distil
from seppo_fast.checksums import checksum
from seppo_fast.quickstart.digits import CAPTIONS

LORA = "pytorch_lora_weights.safetensors"
SMALL = {"UNET": replace(UNET, batch_size=2, latents=4, teacher_steps=2), "FLOW": replace(FLOW, batch_size=1, teacher_steps=1)}
MAKE: dict[str, Callable[[Path], Path]] = {"UNET": tiny_sd, "FLOW": tiny_sd3}


@pytest.fixture(params=MAKE)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(distillation, request.param, SMALL[request.param])
    return request.param


def draw(base: Path, adapter: Path | None, lcm: bool) -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    if lcm:
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    return pipeline(CAPTIONS[0], height=PIXELS, width=PIXELS, num_inference_steps=2, guidance_scale=1.0, output_type="latent",
                    latents=torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(3)),
                    generator=torch.Generator().manual_seed(4)).images


def test_an_adapter_is_made_again_to_the_bit_and_diffusers_reads_it(kind: str, tmp_path: Path) -> None:
    base = MAKE[kind](tmp_path / "base")
    took = [distil(base, tmp_path / name, seed=1, steps=2, guidance=3.0) for name in ("first", "again")]
    assert checksum(tmp_path / "first" / LORA) == checksum(tmp_path / "again" / LORA)
    assert took[0]["flops"] == took[1]["flops"] > 0 and took[0]["seconds"] > 0
    plain, adapted = (draw(base, adapter, kind == "UNET") for adapter in (None, tmp_path / "first"))
    assert 1e-3 < (plain - adapted).abs().max() < 10
