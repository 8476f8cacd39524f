"""Measures on demonstrations that are never trained on: does the policy improve beyond its training data? No scorer is needed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seppo_fast.config import HELD_OUT, METHODS, Seppo
from seppo_fast.ranks import Ranks
from seppo_fast.reference.batching import chunks
from seppo_fast.reference.network import Reference
from seppo_fast.seeds import generator
from seppo_fast.training.objective import Objective
from seppo_fast.training.pairs import PairSource

DRAWS = 4  # noises and timesteps for each demonstration: an error depends on them more than on the policy


@dataclass
class HeldOut:
    """Pairs of the held-out rows, `size` at a time; slots number them as they number pairs of updates.

    Noise and timesteps never change, and both measures compare with the model that training began with: values of two updates
    differ by the policy alone. `rollouts` are that model's for this rank's slots: its samples and its errors.
    """

    pairs: PairSource
    objective: Objective
    ranks: Ranks
    size: int
    rollouts: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    ready: bool = False

    @property
    def rows(self) -> Sequence[int]:
        """All ranks' rows."""
        return self.pairs.order.rows

    @property
    def slots(self) -> list[int]:
        """This rank's slots: those of its share of the rows."""
        mine = {*self.rows[self.ranks.rank :: self.ranks.world]}
        return [slot for slot in range(DRAWS * len(self.rows)) if self.pairs.order.row(slot) in mine]

    @torch.no_grad()
    def prepare(self, reference: Reference, check: Callable[[], None]) -> None:
        """Samples of the initial model, which the reference holds, for these prompts, and its errors on all pairs."""
        slots, row_of = self.slots, self.pairs.order.row
        rollouts: dict[int, dict[str, Tensor]] = {slot: {} for slot in slots}
        if METHODS[self.pairs.settings.method].draws:
            first = {row_of(slot): slot for slot in reversed(slots)}
            samples: dict[int, Tensor] = {}
            for some in self._in_step(list(first.values()), reference.batch_size, check):
                latents = reference.sampler.draw(self.pairs.initial_noise(some), self.pairs.prompts(some),
                                                 later=partial(self.pairs.later_noise, some))
                samples |= {row_of(slot): sample for slot, sample in zip(some, latents.cpu(), strict=True)}
            for slot in slots:
                rollouts[slot]["loser"] = samples[row_of(slot)]
        for some in self._in_step(slots, self.size, check):
            errors = self.objective.score(reference.module, self.pairs.pairs(some, rollouts))
            for slot, pair in zip(some, errors.cpu(), strict=True):
                rollouts[slot]["ref_mse"] = pair
        self.rollouts, self.ready = rollouts, True

    @torch.no_grad()
    def __call__(self, policy: nn.Module, check: Callable[[], None]) -> tuple[float, float | None]:
        """The mean error on the winners, and the share of pairs with a logit above 0 (None for SFT); every rank calls."""
        mine: dict[int, list[float]] = {}
        for some in self._in_step(self.slots, self.size, check):
            pairs = self.pairs.pairs(some, self.rollouts)
            _, table = self.objective(policy, policy, pairs, 1.0, beta=1.0)  # any beta: the logit's sign alone is used
            mine |= dict(zip(some, table[:, [0, -1]].tolist(), strict=True))
        found = {slot: pair for each in self.ranks.objects(mine) for slot, pair in each.items()}
        ordered = [found[slot] for slot in sorted(found)]  # so that no sum depends on the number of ranks
        error = math.fsum(error for error, _ in ordered) / len(ordered)
        accuracy = sum(logit > 0 for _, logit in ordered) / len(ordered)
        return error, accuracy if self.objective.flipper else None

    def _in_step(self, slots: Sequence[int], size: int, check: Callable[[], None]) -> Iterator[Sequence[int]]:
        """Batches of slots. All ranks check for a stop equally often: as often as the rank with the most batches."""
        batches, held = list(chunks(slots, size)), 0
        for number in range(self.ranks.largest(len(batches))):
            check()
            if number < len(batches):
                if number == held:
                    held += len(self.pairs.hold(batches[number:]))
                yield batches[number]


def open_held_out(pairs: PairSource, rows: Sequence[int], settings: Seppo, objective: Objective, size: int, ranks: Ranks
                  ) -> HeldOut:
    """Measures on `rows` of the pairs' cache. Random numbers are not those of the training, captions are never dropped, and one
    noise decides a sign."""
    own = settings.model_copy(update={"seed": generator(settings.seed, "held out").initial_seed(), "caption_dropout": 0.0,
                                      "aaf_draws": 1})
    source = PairSource(pairs.cache, own, pairs.latent_scale, pairs.process, pairs.device, pairs.dtype, rows)
    return HeldOut(source, objective, ranks, size)


def columns(error: float, accuracy: float | None, initial: float | None) -> dict[str, Any]:
    """The measures as in metrics.jsonl; `initial` is the initial model's error. What is not finite has no value."""
    gain = math.nan if initial is None else initial - error
    values = [gain if math.isfinite(gain) else None, accuracy if math.isfinite(error) else None]
    return dict(zip(HELD_OUT, values, strict=True)) if accuracy is not None else {HELD_OUT[0]: values[0]}
