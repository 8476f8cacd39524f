"""The noise process: how a sample is noised, what the network should answer, and at which times it is trained."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor


@dataclass(frozen=True)
class Diffusion:
    """DDPM's (Eq. 2): times are whole timesteps, all equally likely; the answer is the noise, or the velocity."""

    scheduler: DDPMScheduler

    def time(self, random: torch.Generator) -> Tensor:
        """The time of a pair, ()."""
        return torch.randint(len(self.scheduler.alphas_cumprod), (), generator=random)

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents (B, ...) with as much noise as there is at `times` (B,)."""
        return self.scheduler.add_noise(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor | None:
        """What the network should answer, (B, ...); None where that is the noise itself."""
        if self.scheduler.config.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, times)
        return None


def noise_process(scheduler_config: dict[str, Any]) -> Diffusion:
    """The noise process that a model's scheduler configuration stands for."""
    return Diffusion(DDPMScheduler.from_config(scheduler_config))
