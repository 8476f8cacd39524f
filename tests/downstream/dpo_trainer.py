"""Somebody else's trainer: Diffusion-DPO on latents in plain PyTorch. Of the package it knows `seppo_loss`, and nothing more."""

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seppo_fast.ops import seppo_loss

Weights = dict[str, Tensor]
BETA = 500.0
STEPS = 1000  # of the noise schedule
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2, dim=0)


class Denoiser(nn.Module):
    """Noise in (N, 4, H, W) latents at timesteps (N,)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.time = nn.Linear(width, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None] * torch.exp(torch.arange(self.width // 2) * (-math.log(10_000) / (self.width // 2)))
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        hidden = self.enter(latents) + time[:, :, None, None]
        return self.leave(F.silu(hidden + self.middle(F.silu(hidden))))


def preference_pairs(seed: int, pairs: int) -> Iterator[Tensor]:
    """Batches (2 * pairs, 4, 8, 8), winners first: stripes of a random phase; the losers are the same under noise."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.linspace(0, 2 * math.pi, 8).expand(4, 8, 8)
    while True:
        phases = 2 * math.pi * torch.rand(pairs, 1, 1, 1, generator=generator)
        winners = torch.sin(columns + phases)
        yield torch.cat([winners, winners + 0.7 * torch.randn(winners.shape, generator=generator)])


def diffusion_dpo_loss(model_pred: Tensor, ref_pred: Tensor, target: Tensor, accumulation: int) -> Tensor:
    """As in Diffusion-DPO's train.py."""
    if target.shape[0] != model_pred.shape[0]:
        target = target.repeat(2, 1, 1, 1)
    model_losses = (model_pred - target).pow(2).mean(dim=[1, 2, 3])
    model_losses_w, model_losses_l = model_losses.chunk(2)
    model_diff = model_losses_w - model_losses_l
    ref_losses = (ref_pred - target).pow(2).mean(dim=[1, 2, 3])
    ref_losses_w, ref_losses_l = ref_losses.chunk(2)
    ref_diff = ref_losses_w - ref_losses_l
    inside_term = -0.5 * BETA * (model_diff - ref_diff)
    return -F.logsigmoid(inside_term).mean() / accumulation


def replaced_loss(model_pred: Tensor, ref_pred: Tensor, target: Tensor, accumulation: int) -> Tensor:
    """What replaces it."""
    return seppo_loss(model_pred, ref_pred, target, BETA, flipper="none") / accumulation


def replaced_loss_of_known_scale(model_pred: Tensor, ref_pred: Tensor, target: Tensor, accumulation: int) -> Tensor:
    """Likewise; the upstream gradient, known before, is not waited for."""
    return seppo_loss(model_pred, ref_pred, target, BETA, flipper="none", grad_scale=1 / accumulation) / accumulation


def train(loss_of: Callable[[Tensor, Tensor, Tensor, int], Tensor], *, updates: int = 60, accumulation: int = 1, pairs: int = 4,
          shared_target: bool = False, seed: int = 0) -> tuple[Weights, Weights, Tensor]:
    """Weights before and after; loss and gradient norm (updates, 2). The two halves of a batch share noise and timesteps."""
    torch.manual_seed(seed)
    policy = Denoiser()
    reference = copy.deepcopy(policy).requires_grad_(False)
    before = copy.deepcopy(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=1e-2)
    batches, generator, history = preference_pairs(seed, pairs), torch.Generator().manual_seed(seed + 1), []
    for _ in range(updates):
        total = 0.0
        for _ in range(accumulation):
            latents = next(batches)
            noise = torch.randn((pairs, *latents.shape[1:]), generator=generator)
            timesteps = torch.randint(0, STEPS, (pairs,), generator=generator).repeat(2)
            signal = ALPHAS_CUMPROD[timesteps][:, None, None, None]
            noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise.repeat(2, 1, 1, 1)
            model_pred = policy(noisy, timesteps)
            with torch.no_grad():
                ref_pred = reference(noisy, timesteps)
            loss = loss_of(model_pred, ref_pred, noise if shared_target else noise.repeat(2, 1, 1, 1), accumulation)
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append((total, norm.item()))
    return before, policy.state_dict(), torch.tensor(history)
