"""What a CUDA graph forbids, shown without a GPU: a network's call must not copy from the host, nor wait for the device."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from captures import OnTheHost
from tiny import tiny_animatediff, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from tiny_qwen import tiny_qwen
from tiny_wan import tiny_wan
from torch import Tensor

from seppo_fast.models import open_model
from seppo_fast.reference.guidance import guided

MAKE: dict[str, Callable[[Path], Path]] = {"sd": tiny_sd, "sdxl": tiny_sdxl, "animatediff": tiny_animatediff, "sd3": tiny_sd3,
                                           "flux": tiny_flux, "wan": tiny_wan, "wan2.2": partial(tiny_wan, expand_timesteps=True),
                                           "qwen": tiny_qwen}


@torch.no_grad()
def seen(name: str, folder: Path, denoise: Callable[..., Any] | None = None) -> list[str]:
    """What is on the host in a step of the family."""
    model = open_model(str(MAKE[name](folder)))
    with torch.device("meta"):
        denoiser = model.empty_denoiser().eval()
        shape = model.latent_shape(8 * model.vae_scale_factor, 5)
        conditions = {name: torch.empty(2, *shape) for name, shape in model.condition_shapes.items()}
        latents, times = torch.empty(2, *shape), torch.empty(2)
    call = denoise or guided(model, 3.5, conditions)[0]
    with OnTheHost() as mode:
        out = call(denoiser, latents, times, conditions)
    assert out.shape == latents.shape and out.device.type == "meta"
    return mode.names


@pytest.mark.parametrize("name", MAKE)
def test_a_step_stays_on_the_device(name: str, tmp_path: Path) -> None:
    assert seen(name, tmp_path / name) == []


def test_what_is_made_on_the_host_is_seen(tmp_path: Path) -> None:
    """As the FLUX pipeline's own places of the tokens would be without a device."""
    def denoise(denoiser: Any, latents: Tensor, times: Tensor, conditions: Any) -> Tensor:
        return latents + torch.arange(8.0).to(latents.device)

    assert seen("flux", tmp_path / "flux", denoise)


def test_a_number_that_is_copied_is_seen(tmp_path: Path) -> None:
    """As diffusers' own count of a prompt's tokens would do to Qwen-Image."""
    def denoise(denoiser: Any, latents: Tensor, times: Tensor, conditions: Any) -> Tensor:
        return latents + torch.as_tensor(8, device=latents.device)

    assert seen("flux", tmp_path / "flux", denoise)


def test_a_value_that_is_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        seen("flux", tmp_path / "flux", lambda denoiser, latents, times, conditions: latents * times[0].item())
