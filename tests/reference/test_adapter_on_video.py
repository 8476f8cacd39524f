"""An image model's few-step adapter beside an AnimateDiff's UNet, as diffusers puts it there."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import tiny_animatediff
from training.adapter_files import write_lora

from seppo_fast.evaluation.adapters import read_adapter
from seppo_fast.models import open_model
from seppo_fast.reference.adapter import beside
from seppo_fast.reference.tuning import changed
from seppo_fast.training.adapter import adapted_network


@torch.no_grad()
@pytest.mark.parametrize("target", ["attentions.0.proj_in", "conv1"])
def test_it_is_beside_the_layers_of_the_same_names(target: str, tmp_path: Path) -> None:
    folder = tiny_animatediff(tmp_path / "video")
    model = open_model(str(folder), frames=3)
    lora = write_lora(folder, tmp_path / "lora.safetensors", targets=(target,))
    network = model.load_denoiser(torch.float32).eval()
    given = torch.randn(2, 4, 3, 8, 8), torch.tensor([300, 20])
    prompts = torch.randn(2, *model.condition_shapes["prompt_embeds"])
    plain = model.denoise(network, *given, {"prompt_embeds": prompts})
    with changed(beside(network, adapted_network(read_adapter(lora, model), model), "cpu", torch.float32)):
        got = model.denoise(network, *given, {"prompt_embeds": prompts})
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    want = model.denoise(pipeline.unet.eval(), *given, {"prompt_embeds": prompts})
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.01
    assert torch.equal(model.denoise(network, *given, {"prompt_embeds": prompts}), plain)


@torch.no_grad()
def test_a_motion_layer_that_is_called_by_keyword(tmp_path: Path) -> None:
    """Motion modules call their projections with `input=`, which PEFT's own layers would not take."""
    folder = tiny_animatediff(tmp_path / "video")
    model = open_model(str(folder), frames=3)
    lora = write_lora(folder, tmp_path / "lora.safetensors", targets=("motion_modules.0.proj_in",))
    network = model.load_denoiser(torch.float32).eval()
    prompts = torch.randn(2, *model.condition_shapes["prompt_embeds"])
    given = torch.randn(2, 4, 3, 8, 8), torch.tensor([300, 20]), {"prompt_embeds": prompts}
    plain = model.denoise(network, *given)
    with changed(changes := beside(network, adapted_network(read_adapter(lora, model), model), "cpu", torch.float32)):
        got = model.denoise(network, *given)
    for layer, _, both in changes:
        layer.weight += both.scale * both.up.weight @ both.down.weight
    torch.testing.assert_close(got, model.denoise(network, *given), rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 1e-3
