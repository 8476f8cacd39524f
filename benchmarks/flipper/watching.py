"""A trainer that keeps, of some updates, what the flipper sees of each pair, and both networks' samples from the same noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from seppo_fast.quickstart.digits import CAPTIONS
from seppo_fast.seeds import generator, normal
from seppo_fast.training.engine import Step, policy_weights
from seppo_fast.training.objective import Pairs
from seppo_fast.training.trainer import Trainer

AT_ONCE = 4  # draws of a pair's winner that the networks get together


def watched_updates(iterations: int, updates: int, wanted: int) -> list[int]:
    """`wanted` updates of each iteration, at most half of them, evenly spaced; not its first, in which the policy may be the
    reference."""
    return evenly(range(iterations * updates), updates, wanted)


def evenly(numbers: Sequence[int], each: int, wanted: int) -> list[int]:
    """`wanted` of each `each` numbers, evenly spaced."""
    within = [(2 * i + 1) * each // (2 * wanted) for i in range(wanted)]
    return [numbers[first + place] for first in range(0, len(numbers), each) for place in within]


@dataclass
class Watching(Trainer):
    """The trainer, whose run stays what it is. Before each of the updates `watched` it looks at their pairs, and writes
    VIEWS/update_00000001.safetensors with the tensors

        same, other    (n, B) the policy's error on the winner minus the reference's, under n draws of the winner's noise: at the
                       pair's timestep, and each at a timestep of its own; the first draw of both is the pair's own, and the only
                       one but in the updates `averaged`
        reference, own (B, C, h, w) the latents of the pair's loser, and those that the policy draws from the same noise and prompt
        sign, timestep, label, drawer    (B,) the sign in training, the digit in the prompt, the past policy that drew the loser
    """

    views: Path = Path("views")
    watched: Sequence[int] = ()
    averaged: Sequence[int] = ()
    draws: tuple[int, int] = (64, 16)  # at the pair's timestep, at others

    def update_policy(self, update: int) -> tuple[Step, Tensor]:
        if update not in self.watched:
            return super().update_policy(update)
        seen = self.look(update)
        done, table = super().update_policy(update)
        file = self.views / f"update_{update:08d}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file(seen | {"sign": table[:, 4].float().contiguous()}, file)
        return done, table

    @torch.no_grad()
    def look(self, update: int) -> dict[str, Tensor]:
        """What the flipper sees of an update's pairs, and the samples."""
        assert self.reference is not None and self.reference.index is not None
        slots, seed = self.slots(update), self.settings.seed
        same, other = self.draws if update in self.averaged else (1, 1)
        numbers = [self.rollouts.number(slot) for slot in slots]
        self.pairs.hold([numbers])
        pairs = self.pairs.pairs(slots, self.rollouts)
        noises = torch.stack([pairs.noise[:len(slots)], *(normal(self.pairs.cache.shape, seed, f"noise {i}", slots)
                                                          for i in range(1, max(same, other)))])
        time = self.objective.process.time
        times = torch.stack([pairs.timesteps, *(torch.stack([time(generator(seed, f"timestep {i}", slot)) for slot in slots])
                                                for i in range(1, other))])
        with self.reference.holding(policy_weights(self.engine)):
            own = self.reference.sampler.draw(self.pairs.initial_noise(numbers), self.pairs.prompts(numbers))
        captions = self.pairs.cache.prompts.captions([self.pairs.order.row(number) for number in numbers])
        return {
            "same": self.excess(pairs, noises[:same], pairs.timesteps.expand(same, -1)),
            "other": self.excess(pairs, noises[:other], times),
            "reference": pairs.latents[len(slots):].contiguous(), "own": own.contiguous(),
            "timestep": pairs.timesteps.contiguous(), "label": torch.tensor([CAPTIONS.index(caption) for caption in captions]),
            "drawer": torch.full((len(slots),), self.reference.index),
        }

    def excess(self, pairs: Pairs, noises: Tensor, times: Tensor) -> Tensor:
        """(draws, B): the policy's error on the pairs' winners minus the reference's, at these noises and timesteps."""
        assert self.reference is not None
        found, winners = [], pairs.latents[:len(pairs.timesteps)]
        for noise, time in zip(noises.split(AT_ONCE), times.split(AT_ONCE), strict=True):
            conditions = {name: torch.cat([value] * len(noise)) for name, value in pairs.conditions.items()}
            many = Pairs(torch.cat([winners] * len(noise)), noise.flatten(0, 1), time.flatten(), conditions,
                         more_noise=noise.flatten(0, 1)[None])
            excess = self.objective.winner_excess(self.engine, self.reference.module, many)
            found.append(excess.view(len(noise), -1))
        return torch.cat(found)
