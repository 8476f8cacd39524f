"""A small network, a sampler that captures its step, and what it should draw: with a GPU; without one, what a graph forbids."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seppo_fast.config import Sampler as Settings
from seppo_fast.reference import Sampler, classifier_free, sample, solver_table

SCHEDULE = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
            "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def network(seed=0, device="cpu", channels=4):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval().to(device)


class Denoise:
    """A denoiser that counts its calls from Python: a replay makes none."""

    def __init__(self):
        self.calls = 0

    def __call__(self, unet, latents, t, conditions):
        self.calls += 1
        return unet(latents, t, encoder_hidden_states=conditions["prompt_embeds"], return_dict=False)[0]


def given(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 4, 8, 8, generator=g).cuda(),
            {"prompt_embeds": 3 * torch.randn(count, 5, 12, generator=g).cuda()})


UNCONDITIONAL = {"prompt_embeds": torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(7))}


def captured(unet, denoise, solver="ddim", autocast=None, say=lambda text: None, **settings):
    settings = Settings(**{"guidance_scale": 2.5, "batch_size": 4} | settings)
    table = solver_table(SCHEDULE, solver, 5).to("cuda")
    branches = classifier_free(settings.guidance_scale, UNCONDITIONAL)
    return Sampler(unet, denoise, table, UNCONDITIONAL, branches, settings, torch.float32, autocast, say)


def expected(unet, noise, conditions, guidance=2.5, solver="ddim", autocast=None):
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        return sample(lambda *args: Denoise()(unet, *args), solver_table(SCHEDULE, solver, 5).to("cuda"), noise, conditions,
                      UNCONDITIONAL, classifier_free(guidance, UNCONDITIONAL), torch.float32)


def close(got, want, tolerance=1e-3):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


class FromNumbers(TorchFunctionMode):
    """Notes the calls that make a tensor of Python's numbers: on a GPU each is a copy from the host, on "meta" nothing."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            self.names.append(f"{func.__name__}({args[0]})")
        return func(*args, **(kwargs or {}))


class OnTheHost(TorchDispatchMode):
    """What reads or makes a tensor on the CPU, or makes one of numbers; the device is "meta", which has no values to wait for.

    Reading a value there is an error of PyTorch's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._numbers = FromNumbers(self.names)

    def __enter__(self) -> "OnTheHost":
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._numbers.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.device.type == "cpu" for leaf in tree_leaves((args, kwargs, result))):
            self.names.append(str(func))
        return result
