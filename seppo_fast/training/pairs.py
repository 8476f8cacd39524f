"""Pairs by slot: every draw depends on the run's seed and the slot alone, never on batch size, rank or restarts.

A slot numbers one pair of one update: `update * batch.size + position`. The iteration is a function of it.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from seppo_fast.config import METHODS, Seppo
from seppo_fast.data import ClipStream, LatentCache, Order
from seppo_fast.data.latents import CachedRows
from seppo_fast.models import Conditions
from seppo_fast.models.latents import LatentScale
from seppo_fast.models.pix2pix import IMAGE
from seppo_fast.seeds import generator, normal
from seppo_fast.training.noise import NoiseProcess
from seppo_fast.training.objective import Pairs
from seppo_fast.training.tasks import IMPROVE, UNCONDITIONAL, task_of

# A slot's rollout, on the CPU: "loser", a past policy's sample (C, h, w), scaled latents; "ref_mse" (2,) fp32, the reference's
# errors on the pair's winner and loser, where they are computed ahead of the training; "number" (), the sample's, if not the slot;
# "winner" (C, h, w), what the improvement model made of the loser.
Rollout = dict[str, Tensor]


class Rollouts(Protocol):
    """Rollouts by slot."""

    def get(self, slot: int, default: Rollout, /) -> Rollout:
        """A slot's rollout, or the default where it has none."""


class PairSource:
    """Winners and prompt embeddings from the cache, losers from the cache (`dpo`) or from rollouts.

    `rows`: those of the cache that are used; None is all of them.
    """

    def __init__(self, cache: LatentCache | ClipStream, settings: Seppo, latent_scale: LatentScale, process: NoiseProcess,
                 device: torch.device, dtype: torch.dtype, rows: Sequence[int] | None = None) -> None:
        self.cache, self.settings, self.latent_scale = cache, settings, latent_scale
        self.process, self.device, self.dtype = process, device, dtype
        self.order = Order(len(cache), settings.seed, rows)
        self.unconditional = self._embeddings([0])

    def pairs(self, slots: Sequence[int], rollouts: Rollouts) -> Pairs:
        """The micro-batch of these slots, with their rollouts; copied without waiting for the device."""
        seed, method = self.settings.seed, METHODS[self.settings.method]
        drawn = [rollouts.get(slot, {}) for slot in slots]
        numbers = [int(rollout.get("number", slot)) for slot, rollout in zip(slots, drawn, strict=True)]
        rows = self.cache.rows(*self._places(numbers))
        if self.settings.method == "improvement":
            return self._tasks(slots, rows)
        if drawn and "winner" in drawn[0]:
            latents = [torch.stack([rollout["winner"] for rollout in drawn])]
        else:
            latents = [self._latents(rows.mean, rows.std, "posterior", slots)]
        if method.needs_losers:
            assert rows.loser_mean is not None and rows.loser_std is not None, "the cache was made without losers"
            latents.append(self._latents(rows.loser_mean, rows.loser_std, "loser posterior", slots))
        elif method.draws:
            latents.append(torch.stack([rollout["loser"] for rollout in drawn]))
        noise = [normal(self.cache.shape, seed, "noise", slots)]
        if len(latents) == 2 and self.settings.noise == "independent":
            noise.append(normal(self.cache.shape, seed, "loser noise", slots))
        prompts = [0 if self._dropped(slot) else prompt for slot, prompt in zip(slots, rows.prompts, strict=True)]
        more = [normal(self.cache.shape, seed, f"noise {i}", slots) for i in range(1, self.settings.aaf_draws)]
        scores = [rollout["ref_mse"] for rollout in drawn if "ref_mse" in rollout]
        return Pairs(self._to_device(torch.cat(latents)), self._to_device(torch.cat(noise)), self._timesteps(slots),
                     self._embeddings(prompts), self._to_device(torch.stack(scores, dim=1).flatten()) if scores else None,
                     more_noise=self._to_device(torch.stack(more)) if more else None)

    def blank(self, size: int) -> Pairs:
        """Zeros and no prompts in the shapes of a micro-batch of `size`."""
        zeros = self._to_device(torch.zeros(size, *self.cache.shape))
        conditions = {name: torch.cat([value] * size) for name, value in self.unconditional.items()}
        if self.settings.method == "improvement":
            conditions[IMAGE] = zeros.to(self.dtype)
        return Pairs(torch.cat([zeros] * (2 if self.settings.flipper else 1)), zeros, self._timesteps(range(size)), conditions)

    def _tasks(self, slots: Sequence[int], rows: CachedRows) -> Pairs:
        """One picture a slot, with what its task gives: image and prompt, the image alone, or nothing (Eq. 6, 7, 8)."""
        seed = self.settings.seed
        assert rows.loser_mean is not None and rows.loser_std is not None, "the cache was made without losers"
        tasks = [task_of(slot, seed, self.settings.improvement.tasks) for slot in slots]
        winner = _column([task.winner for task in tasks], rows.mean)
        mean, std = torch.where(winner, rows.mean, rows.loser_mean), torch.where(winner, rows.std, rows.loser_std)
        image = torch.where(_column([task.kind == IMPROVE for task in tasks], mean), rows.loser_mean, mean)
        image = image.masked_fill(_column([task.kind == UNCONDITIONAL for task in tasks], mean), 0)
        prompts = [prompt if task.kind == IMPROVE and not self._dropped(slot) else 0
                   for slot, task, prompt in zip(slots, tasks, rows.prompts, strict=True)]
        return Pairs(self._to_device(self._latents(mean, std, "posterior", slots)),
                     self._to_device(normal(self.cache.shape, seed, "noise", slots)), self._timesteps(slots),
                     self._embeddings(prompts) | {IMAGE: self._to_device(image.to(self.dtype))},
                     tasks=self._to_device(torch.tensor([task.kind for task in tasks])))

    def _timesteps(self, slots: Sequence[int]) -> Tensor:
        seed = self.settings.seed
        return self._to_device(torch.stack([self.process.time(generator(seed, "timestep", slot)) for slot in slots]))

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Announce the samples that come next, so that video clips are decoded in the background."""
        self.cache.prefetch(*self._places(numbers))

    def hold(self, batches: list[Sequence[int]]) -> list[Sequence[int]]:
        """Those of these batches of samples, from the first, whose prompts are at hand until the next call; at least one of them.

        Where embeddings are not cached they are made here, so that no other thread needs the text encoder.
        """
        some = batches[: max(1, self.cache.texts.window // max(1, len(batches[0])))] if batches else batches
        rows = [self.order.row(number) for batch in some for number in batch]
        self.cache.texts.hold(self.cache.prompts.of_row[rows].tolist())
        return some

    def prompts(self, numbers: Sequence[int]) -> Conditions:
        """Prompt embeddings of these samples, never dropped: what they are drawn for."""
        rows = [self.order.row(number) for number in numbers]
        return self._embeddings(self.cache.prompts.of_row[rows].tolist())

    def initial_noise(self, numbers: Sequence[int], purpose: str = "initial noise") -> Tensor:
        """`(B, C, h, w)` from which these samples start."""
        return self._to_device(normal(self.cache.shape, self.settings.seed, purpose, numbers))

    def later_noise(self, numbers: Sequence[int], index: int) -> Tensor:
        """`(B, C, h, w)`, the noise that a solver adds on its way to these samples, of this index."""
        return self.initial_noise(numbers, f"later noise {index}")

    def _latents(self, mean: Tensor, std: Tensor, purpose: str, slots: Sequence[int]) -> Tensor:
        if self.settings.data.posterior == "sample":
            mean = mean + std * normal(self.cache.shape, self.settings.seed, purpose, slots)
        return self.latent_scale.scaled(mean)

    def _places(self, numbers: Iterable[int]) -> tuple[list[int], list[int]]:
        """The rows of these samples, and their epochs."""
        places = [self.order.place(number) for number in numbers]
        return [row for _, row in places], [epoch for epoch, _ in places]

    def _dropped(self, slot: int) -> bool:
        chance = self.settings.caption_dropout
        return chance > 0 and torch.rand((), generator=generator(self.settings.seed, "dropout", slot)).item() < chance

    def _embeddings(self, prompts: Sequence[int]) -> Conditions:
        return {name: self._to_device(value.to(self.dtype)) for name, value in self.cache.embeddings(prompts).items()}

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":  # from pageable memory the copy would wait for all that the device still has to do
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def _column(values: Sequence[bool], like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to choose rows of a tensor (B, ...) by."""
    return torch.tensor(values).view(-1, *[1] * (like.dim() - 1))
