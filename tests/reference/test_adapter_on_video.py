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
@pytest.mark.parametrize("target", ["proj_in", "conv1"])
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
    torch.testing.assert_close(got, pipeline.unet(*given, encoder_hidden_states=prompts).sample, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.01
    assert torch.equal(model.denoise(network, *given, {"prompt_embeds": prompts}), plain)
