"""The noise process: how a sample is noised, what the network should answer, and at which times it is trained."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from seppo_fast.config import Timesteps
from seppo_fast.errors import UserError
from seppo_fast.models.schedules import is_flow


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


@dataclass(frozen=True)
class Flow:
    """Flow matching: sigma from 0 (the sample) to 1 (noise), x = (1 - sigma) x0 + sigma noise, and the answer is noise - x0.

    Times are `sigma * scale`, as schedulers count them. Sigma is logit-normal or uniform, and then shifted:
    s' = k s / (1 + (k - 1) s), k = `shift`, as the model's scheduler shifts it.
    """

    density: str
    mean: float
    std: float
    shift: float
    scale: int

    def time(self, random: torch.Generator) -> Tensor:
        """The time of a pair, () fp32."""
        if self.density == "uniform":
            sigma = torch.rand((), generator=random)
        else:
            sigma = torch.sigmoid(self.mean + self.std * torch.randn((), generator=random))
        return self.scale * self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents (B, ...) with as much noise as there is at `times` (B,)."""
        sigma = (times / self.scale).view(-1, *[1] * (latents.dim() - 1))
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the network should answer, (B, ...): the velocity, which differs between samples that share their noise."""
        return noise - latents


NoiseProcess = Diffusion | Flow


def noise_process(scheduler_config: dict[str, Any], timesteps: Timesteps | None = None, shift: float = 1.0) -> NoiseProcess:
    """The noise process that a model's scheduler configuration stands for; `shift` is the model's own."""
    if is_flow(scheduler_config):
        law = timesteps or Timesteps()
        own = shift if law.shift == "model" else law.shift
        return Flow(law.density, law.mean, law.std, own, scheduler_config.get("num_train_timesteps", 1000))
    if timesteps is not None:
        raise UserError("seppo.timesteps: this model is no flow: its timesteps are whole numbers, all equally likely; leave it out")
    return Diffusion(DDPMScheduler.from_config(scheduler_config))
