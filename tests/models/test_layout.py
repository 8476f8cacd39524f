"""channels_last on a GPU, whose group norm answers contiguously and whose cuDNN looks at input and weight."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter, UNetMotionModel
from tiny import tiny_adapter, unet
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from seppo_fast.config import Lora
from seppo_fast.config import Model as Settings
from seppo_fast.models.lora import add_lora
from seppo_fast.models.prepare import prepare_denoisers
from seppo_fast.reference.cuda_graph import fingerprint

CPU = torch.device("cpu")
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 40 + 6 * 8,
        "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
aten = torch.ops.aten


class Gpu(TorchDispatchMode):
    """ATen's rules on CUDA, on the CPU: `layouts` has for each convolution, forward and backward, whether cuDNN takes NHWC."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts: dict[str, list[bool]] = {"forward": [], "backward": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        looked_at = {aten.convolution.default: ("forward", args[:2]), aten.convolution_backward.default: ("backward", args[1:3])}
        if func in looked_at:
            when, tensors = looked_at[func]
            self.layouts[when].append(any(suggest_memory_format(tensor) == torch.channels_last for tensor in tensors))
        result = func(*args, **(kwargs or {}))
        if func in (aten.native_group_norm.default, aten.native_group_norm_backward.default):
            return result[0].contiguous(), *result[1:]
        return result


def prepared(network: nn.Module, channels_last: bool = True) -> nn.Module:
    prepare_denoisers([network], Settings(path="x", channels_last=channels_last), (8, 8), torch.float32, CPU, lambda line: None,
                      inputs=lambda dtype: {})
    return network


def call(network: nn.Module, frames: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 8, 8) if frames is None else (2, 4, frames, 8, 8)
    latents, prompt, pooled = (torch.randn(*size, generator=generator) for size in (shape, (2 * (frames or 1), 7, 32), (2, 40)))
    added = {"text_embeds": pooled, "time_ids": torch.zeros(2, 6)}
    return network(latents, torch.tensor([3, 9]), encoder_hidden_states=prompt, added_cond_kwargs=added).sample


def sd() -> tuple[nn.Module, int | None]:
    return unet(), None


def sdxl() -> tuple[nn.Module, int | None]:
    return unet(**SDXL), None


def motion(tmp_path: Path) -> tuple[nn.Module, int | None]:
    return UNetMotionModel.from_unet2d(unet(), MotionAdapter.from_pretrained(tiny_adapter(tmp_path))), 4


def with_lora() -> tuple[nn.Module, int | None]:
    network = unet()
    add_lora(network, Lora(rank=2, targets=["to_q", "conv1"]), 0)
    return network, None


def checkpointed() -> tuple[nn.Module, int | None]:
    network = unet().train()
    network.enable_gradient_checkpointing()
    return network, None


@pytest.mark.parametrize("make", [sd, sdxl, motion, with_lora, checkpointed])
def test_all_convolutions_see_channels_last(make: Callable[..., tuple[nn.Module, int | None]], tmp_path: Path) -> None:
    network, frames = make(tmp_path) if make is motion else make()
    prepared(network)
    with Gpu() as gpu:
        call(network, frames).square().mean().backward()
    convolutions = sum(isinstance(part, nn.Conv2d) for part in network.modules())
    assert convolutions > 15 and len(gpu.layouts["forward"]) >= convolutions and len(gpu.layouts["backward"]) > 15
    assert all(gpu.layouts["forward"]) and all(gpu.layouts["backward"])


def test_the_emulation_tells_layouts_apart() -> None:
    """Contiguous latents and weights: none; latents alone in channels_last: the first convolution alone; asked for none: none."""
    for change, most in ((lambda module, given: given, 0),
                         (lambda module, given: (given[0].contiguous(memory_format=torch.channels_last), *given[1:]), 2)):
        network = prepared(unet(), channels_last=False)
        network.conv_in.register_forward_pre_hook(change)
        with Gpu() as gpu, torch.no_grad():
            call(network)
        assert sum(gpu.layouts["forward"]) <= most < len(gpu.layouts["forward"])


def test_policy_and_reference_answer_alike_to_the_bit() -> None:
    policy, reference = (prepared(unet().train(training)) for training in (True, False))
    reference.load_state_dict(policy.state_dict())
    with torch.no_grad():
        expected = call(reference)
    assert torch.equal(call(policy).detach(), expected)
    plain = prepared(unet(), channels_last=False)
    plain.load_state_dict(policy.state_dict())
    torch.testing.assert_close(expected, call(plain).detach())


def test_a_sampler_sees_no_change_from_draw_to_draw() -> None:
    network = prepared(unet())
    before = fingerprint(network)
    with torch.no_grad():
        call(network)
    assert fingerprint(network) == before
