"""Pairs by slot: every draw depends on the run's seed and the slot alone, never on batch size, rank or restarts.

A slot numbers one pair of one update: `update * batch.size + position`. The iteration is a function of it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from seppo_fast.config import Seppo
from seppo_fast.data.latents import LatentCache
from seppo_fast.data.order import Order
from seppo_fast.models import Conditions
from seppo_fast.seeds import generator, normal
from seppo_fast.training.objective import Pairs


class PairSource:
    """Winners and prompt embeddings from the cache, losers from the cache (`dpo`) or from what the reference made."""

    def __init__(self, cache: LatentCache, settings: Seppo, scaling_factor: float, num_timesteps: int,
                 device: torch.device, dtype: torch.dtype) -> None:
        self.cache, self.settings, self.scaling_factor = cache, settings, scaling_factor
        self.num_timesteps, self.device, self.dtype = num_timesteps, device, dtype
        self.order = Order(len(cache), settings.seed)
        self.unconditional = self._to_device(cache.embeddings([0]))

    def pairs(self, slots: Sequence[int], losers: Mapping[int, Tensor]) -> Pairs:
        """The micro-batch of these slots; `losers` are the reference samples by slot, scaled latents."""
        seed = self.settings.seed
        rows = self.cache.rows([self.order.row(slot) for slot in slots])
        latents = [self._latents(rows.mean, rows.std, "posterior", slots)]
        if self.settings.method == "dpo":
            latents.append(self._latents(rows.loser_mean, rows.loser_std, "loser posterior", slots))
        elif self.settings.method != "sft":
            latents.append(torch.stack([losers[slot] for slot in slots]))
        noise = [normal(self.cache.shape, seed, "noise", slots)]
        if len(latents) == 2 and self.settings.noise == "independent":
            noise.append(normal(self.cache.shape, seed, "loser noise", slots))
        timesteps = [torch.randint(self.num_timesteps, (), generator=generator(seed, "timestep", slot)) for slot in slots]
        prompts = [0 if self._dropped(slot) else prompt for slot, prompt in zip(slots, rows.prompts, strict=True)]
        return Pairs(torch.cat(latents).to(self.device), torch.cat(noise).to(self.device),
                     torch.stack(timesteps).to(self.device), self._to_device(self.cache.embeddings(prompts)))

    def prompts(self, slots: Sequence[int]) -> Conditions:
        """Prompt embeddings of these slots, never dropped: what the reference is asked for."""
        rows = [self.order.row(slot) for slot in slots]
        return self._to_device(self.cache.embeddings(self.cache.prompts.of_row[rows]))

    def initial_noise(self, slots: Sequence[int]) -> Tensor:
        """`(B, C, h, w)` from which the reference samples of these slots start."""
        return normal(self.cache.shape, self.settings.seed, "initial noise", slots).to(self.device)

    def _latents(self, mean: Tensor, std: Tensor, purpose: str, slots: Sequence[int]) -> Tensor:
        if self.settings.data.posterior == "sample":
            mean = mean + std * normal(self.cache.shape, self.settings.seed, purpose, slots)
        return mean * self.scaling_factor

    def _dropped(self, slot: int) -> bool:
        chance = self.settings.caption_dropout
        return chance > 0 and torch.rand((), generator=generator(self.settings.seed, "dropout", slot)).item() < chance

    def _to_device(self, conditions: Conditions) -> Conditions:
        return {name: value.to(self.device, self.dtype) for name, value in conditions.items()}
