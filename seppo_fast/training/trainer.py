"""SePPO (Algorithm 1); other rows of the methods' table make the same loop SPIN, DITTO, Diffusion-DPO or SFT."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from seppo_fast.config import METHODS, Seppo
from seppo_fast.configfile import Batch
from seppo_fast.errors import UserError
from seppo_fast.ranks import Ranks
from seppo_fast.reference.batching import chunks
from seppo_fast.reference.improver import Improver
from seppo_fast.reference.network import Reference
from seppo_fast.reference.pool import pick
from seppo_fast.seeds import generator
from seppo_fast.signals import Stop, StopSignals
from seppo_fast.training import checkpoint, status
from seppo_fast.training.checkpoint import State
from seppo_fast.training.divergence import largest_in_range
from seppo_fast.training.engine import Step, image_weight_norm, policy_weights, step, upstream_gradient
from seppo_fast.training.looks import Looks
from seppo_fast.training.metrics import peak_memory_gb, summarise
from seppo_fast.training.objective import Objective
from seppo_fast.training.pairs import PairSource
from seppo_fast.training.prefetch import prefetched
from seppo_fast.training.reporter import Reporter
from seppo_fast.training.rollouts import OneUse, SampleSet, blame

PHASES = ("sampling", "training", "data", "evaluation", "grids", "pool", "checkpoints")  # the parts of a row's seconds


@dataclass
class Trainer:
    """One run. `looks` is None without grids and evaluations; `reference` is None for SFT without `looks`.

    `rollouts` are what past policies drew for the updates to come. `room` warns where the disk fills up.
    """

    settings: Seppo
    batch: Batch
    ranks: Ranks
    engine: DeepSpeedEngine
    objective: Objective
    pairs: PairSource
    reference: Reference | None
    improver: Improver | None
    looks: Looks | None
    reporter: Reporter
    signals: StopSignals
    folder: Path
    state: State
    rollouts: OneUse | SampleSet = field(default_factory=OneUse)
    room: Callable[[int], str | None] = lambda updates: None
    seconds: dict[str, float] = field(default_factory=dict)
    last_row: float = 0.0  # when it was written, by the performance counter
    unproven: int | None = None  # the update of a checkpoint whose policy's error is not known yet

    def train(self) -> None:
        """Algorithm 1 from the state's update on; `Stop` leaves a checkpoint behind."""
        self.signals.deferred = True
        self.last_row = time.perf_counter()
        if self.reference is not None:
            self.reference.offload()
        try:
            if self.looks is not None:
                with self.timed("grids"):
                    self.looks.draw_missing_grid()
            self.evaluate()
            for k in range(self.iteration_of(self.state.update), self.settings.iterations + 1):  # line 1
                self.take_reference(k)  # line 2
                for update in range(self.state.update, k * self.settings.updates_per_iteration):
                    if self.gets_no_better():
                        return
                    self.pairs.prefetch(map(self.rollouts.number, self.slots(update)))  # videos: decoded meanwhile
                    self.draw_rollouts(k, update)  # line 3
                    done = self.update_policy(update)  # line 4
                    self.finish_update(k, *done)
            self.save()  # unless it exists: a failed export then needs no second training
        except Stop as stop:
            stop.checkpoint = self.save()
            raise

    def iteration_of(self, update: int) -> int:
        """The 1-based iteration of a 0-based update."""
        return update // self.settings.updates_per_iteration + 1

    def take_reference(self, k: int) -> None:
        """Line 2: sample a past policy among 0..k-1, the same on every rank, into the one reference model."""
        strategy, seed = self.settings.reference, self.settings.seed
        if self.reference is None or strategy is None:
            return
        with self.timed("pool"):
            self.reference.take(pick(strategy, k, seed))
        if k < self.settings.iterations:
            self.reference.prefetch(pick(strategy, k + 1, seed))

    def draw_rollouts(self, k: int, update: int) -> None:
        """Line 3: losers by past policies, their improved winners, scores if `rollout`: what this update, or iteration, lacks."""
        method, scores = METHODS[self.settings.method], self.settings.reference_score == "rollout"
        if self.reference is None or not (method.draws or scores):
            return
        last = update + 1 if self.settings.sampler.window == "update" else k * self.settings.updates_per_iteration
        window = [slot for u in range(update, last) for slot in self.slots(u)]
        while batches := self.rollouts.missing(k, window, self.reference.batch_size):  # where there are none it stays offloaded
            with self.timed("data"):
                batches = self.pairs.hold(batches)
                # Equally many on each rank, where the first batches are not of one size.
                batches = batches[: -self.ranks.largest(-len(batches))]
            with (self.timed("sampling"), self.reference.drawing(k - 1 if method.losers == "latest" else None),
                  self.improver.on_device() if self.improver else nullcontext(),
                  self.reporter.sampling(sum(map(len, batches))) as progress):
                for numbers in batches:
                    self.rollouts.add(numbers, self.draw(self.reference, numbers))
                    progress.update(len(numbers))
                    status.alive(self.reporter.status)

    def draw(self, reference: Reference, numbers: Sequence[int]) -> dict[str, Tensor]:
        """A batch of rollouts, on the CPU; scored in batches as large as those in which they are drawn."""
        drawn: dict[str, Tensor] = {}
        if METHODS[self.settings.method].draws:
            prompts = self.pairs.prompts(numbers)
            losers = reference.sampler.draw(self.pairs.initial_noise(numbers), prompts, self.check_drawing,
                                            partial(self.pairs.later_noise, numbers))
            drawn["loser"] = losers.cpu()
            if self.improver is not None:
                noise = self.pairs.initial_noise(numbers, "improvement noise")
                drawn["winner"] = self.improver.improve(losers, prompts, noise, self.check_drawing).cpu()
        if self.settings.reference_score == "rollout":
            rollouts = {number: {name: value[i] for name, value in drawn.items()} for i, number in enumerate(numbers)}
            drawn["ref_mse"] = self.objective.score(reference.module, self.pairs.pairs(numbers, rollouts)).cpu()
        return drawn

    def update_policy(self, update: int) -> tuple[Step, Tensor]:
        """Line 4: one optimizer update over the accumulation window; returns its result and all ranks' table of pairs."""
        # For dropout: an update that is repeated after a stop in its middle must draw the same.
        torch.manual_seed(generator(self.settings.seed, "dropout", update, self.ranks.rank).initial_seed())
        tables, done = [], None
        reference = None if self.reference is None or self.still_is_reference(update) else self.reference.module
        with self.timed("data"):
            self.pairs.hold([[*map(self.rollouts.number, self.slots(update))]])
        micro_batches = prefetched(lambda slots: self.pairs.pairs(slots, self.rollouts),
                                   chunks(self.slots(update), self.batch.micro), self.ranks.device)
        with closing(micro_batches):
            while done is None:
                status.alive(self.reporter.status)
                with self.timed("data"):
                    pairs = next(micro_batches)
                with self.timed("training"):
                    loss, table = self.objective(self.engine, reference, pairs, upstream_gradient(self.engine), self.beta)
                    self.engine.backward(loss)
                    done = step(self.engine)
                tables.append(table)
                if done is None:  # after the last one, the update must be counted first
                    self.signals.check_now_and_then(self.ranks, "micro-batches")
        with self.timed("training"):
            return done, self.ranks.gather(torch.cat(tables).cpu())

    def still_is_reference(self, update: int) -> bool:
        """Whether the policy still equals its reference: that is the latest policy of the pool, and no update has been made since.

        Then every pair is a tie by definition. The same error, computed twice in batches of other sizes, differs by rounding, and
        the flipper would react to that difference.
        """
        if self.reference is None or self.reference.fixed is not None or self.settings.reference_score != "rollout":
            return False
        kept = self.reference.pool.dtype
        exact = torch.promote_types(kept, self.objective.dtype) == kept
        drops = self.settings.model.lora is not None and self.settings.model.lora.dropout > 0
        same = self.state.unmoved and self.reference.index == self.iteration_of(update) - 1
        return exact and same and not drops

    def finish_update(self, k: int, done: Step, table: Tensor) -> None:
        """Count and report the update; add the policy to the pool, evaluate, write a checkpoint, draw a grid, each at its turn."""
        slots = self.slots(self.state.update)
        self.state.update += 1
        self.state.skipped += done.skipped
        self.state.unmoved &= done.skipped
        lost = done.skipped and not (done.harmless and bool(table.isfinite().all()))
        self.state.nonfinite_in_a_row = self.state.nonfinite_in_a_row + 1 if lost else 0
        unusable = self.unusable_samples(slots) if lost else ""
        self.rollouts.forget(slots)
        self.report(k, done, table)
        if self.settings.beta == "auto":
            self.state.margins = self.state.margins.after(table)
        self.watch(table)
        self.give_up_if_lost(unusable)

        end_of_iteration = self.state.update == k * self.settings.updates_per_iteration
        if end_of_iteration:
            self.add_to_pool(k)
        self.evaluate()
        every = self.settings.checkpoint.every
        is_best = self.settings.evaluation.keep_best and self.state.best_update == self.state.update
        if (self.state.update % every == 0 if every else end_of_iteration) or is_best or self.gets_no_better():
            with self.timed("checkpoints"):
                self.save()
            self.unproven = self.state.update
        if self.looks is not None:
            with self.timed("grids"):
                self.looks.draw_grid()
        self.check_signals()

    def add_to_pool(self, k: int) -> None:
        """Add the policy to the past ones, as the policy of iteration k."""
        if self.reference is None or self.settings.reference is None:
            return
        pool = self.reference.pool
        with self.timed("pool"):
            pool.add(k, policy_weights(self.engine), write=self.ranks.rank == 0)
            self.ranks.barrier()
        self.state.unmoved = True
        pool.checksums.update(self.ranks.from_first(pool.checksums))  # it wrote

    def evaluate(self) -> None:
        """Measure the present policy, if it is its turn."""
        if self.looks is not None:
            with self.timed("evaluation"):
                self.looks.evaluate()

    @property
    def beta(self) -> float:
        """The loss's beta in the next update."""
        return self.state.margins.beta if self.settings.beta == "auto" else self.settings.beta

    def slots(self, update: int) -> range:
        """This rank's share of an update's slots."""
        share = self.batch.size // self.batch.world
        first = update * self.batch.size + self.ranks.rank * share
        return range(first, first + share)

    def check_signals(self) -> None:
        """Raise `Stop` on all ranks once one of them was signalled."""
        self.signals.check(self.ranks)

    def check_drawing(self) -> None:
        """The same before each solver step, every few seconds."""
        self.signals.check_now_and_then(self.ranks, "solver steps")

    def gets_no_better(self) -> bool:
        """Whether the last `patience` evaluations brought no better policy."""
        patience = self.settings.evaluation.patience
        return patience is not None and self.state.not_better >= patience

    def save(self) -> Path:
        """A checkpoint of this moment; in the middle of a window, of the window's start and its rollouts."""
        if self.ranks.rank == 0 and (warning := self.room(self.settings.updates - self.state.update + 1)):  # and this one
            self.reporter.say(warning)
        path = checkpoint.save(self.folder / "checkpoints", self.engine, self.state, self.rollouts.unused, self.ranks,
                               self.settings.checkpoint.keep_last, self.settings.evaluation.keep_best)
        self.remove_old_rollouts()
        self.reporter.checkpoint(path)
        return path

    def report(self, k: int, done: Step, table: Tensor) -> None:
        """One row of metrics.jsonl; seconds are means over the ranks, memory is the largest.

        `seconds` is the wall-clock time since the previous row, and the others are its parts.
        """
        now = time.perf_counter()
        parts, self.seconds = [self.seconds.get(name, 0.0) for name in PHASES], {}
        wall, self.last_row = now - self.last_row, now
        own = [wall, *parts, max(0.0, wall - sum(parts)), peak_memory_gb(self.ranks.device)]
        everyone = self.ranks.gather(torch.tensor([own], dtype=torch.double))
        wall, *parts, _ = everyone.mean(dim=0).tolist()
        row = {"update": self.state.update, "iteration": k, "reference": None if self.reference is None else self.reference.index,
               **summarise(table, self.settings.flips, self.settings.sft_weight), **image_weight_norm(self.engine),
               "grad_norm": done.grad_norm, "lr": done.lr,
               **({"beta": self.beta} if self.settings.flipper else {}),
               "skipped_steps": self.state.skipped,
               "pairs_per_s": round(self.batch.size / max(wall, 1e-9), 3),
               "peak_memory_gb": round(everyone[:, -1].max().item(), 3), "seconds": round(wall, 4),
               **{f"seconds_{name}": round(value, 4) for name, value in zip([*PHASES, "other"], parts, strict=True)}}
        self.reporter.update(row)

    def watch(self, table: Tensor) -> None:
        """Check that the policy's error on the winners is in its range; if so, older checkpoints can be removed."""
        error, sound = table[:, 0].double().mean().item(), self.state.sound
        known = sound is not None and sound < self.state.update - 2  # by the update before this one
        if self.state.watch(error):
            if self.unproven is not None and self.unproven < self.state.update:
                self.remove_old_checkpoints()
        elif not known and math.isfinite(error):
            good = checkpoint.last_sound(self.folder / "checkpoints", self.state)
            self.reporter.say(f"update {self.state.update}: the error on the winners, {error:.4g}, left its range (up to"
                              f" {largest_in_range(self.state.errors):.4g}); is the learning rate too high? The newest"
                              f" checkpoint from before: {good or 'none yet'}")

    def remove_old_checkpoints(self) -> None:
        """Keep the newest `keep_last`, the best one, and, where the winners' error is out of its range, the last sound one."""
        self.unproven = None
        if self.ranks.rank == 0:
            with self.timed("checkpoints"):
                folder = self.folder / "checkpoints"
                sound = checkpoint.last_sound(folder, self.state) if self.state.diverged else None
                checkpoint.remove_old(folder, self.state, self.settings.checkpoint.keep_last,
                                      self.settings.evaluation.keep_best, sound)
                self.remove_old_rollouts()

    def remove_old_rollouts(self) -> None:
        """Remove the sets of iterations that neither a checkpoint nor this run goes on with."""
        if self.ranks.rank == 0 and isinstance(self.rollouts, SampleSet):
            updates = [self.state.update, *map(checkpoint.update_of, checkpoint.complete(self.folder / "checkpoints"))]
            self.rollouts.remove_old(map(self.iteration_of, updates))

    def unusable_samples(self, slots: Sequence[int]) -> str:
        """Says how many of a skipped update's samples are not finite, and what drew them; the words for it, empty if all are."""
        found = [each for of_rank in self.ranks.objects(self.rollouts.not_finite(slots)) for each in of_rank]
        if not found:
            return ""
        words = f"of its {self.batch.size} samples {len(found)} are not finite: {blame(found)}"
        self.reporter.say(f"update {self.state.update} is skipped: {words}")
        return words

    def give_up_if_lost(self, unusable: str) -> None:
        """Stop when too many updates in a row were skipped because loss or gradients were not finite."""
        if self.state.nonfinite_in_a_row < self.settings.max_nonfinite:
            return
        compared = f" or seppo.beta ({self.beta:.4g} here)" if self.settings.flipper else ""
        causes = (f"Lower optimizer.params.lr{compared}, clip gradients, or train in bf16 or fp32" if not unusable else
                  unusable[0].upper() + unusable[1:] + "; with seppo.sampler.samples_per_iteration such samples are dropped")
        good = checkpoint.last_sound(self.folder / "checkpoints", self.state)
        raise UserError(
            f"{self.state.nonfinite_in_a_row} updates in a row had a loss or gradients that are not finite"
            f" (seppo.max_nonfinite), the last one update {self.state.update}; all of them were skipped. Last good"
            f" checkpoint, from before the error on the winners left its range: {good or 'none yet'}. {causes}: "
            + (checkpoint.anew(good) if good else "begin anew in another seppo.output_dir")
        )

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to this update's."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
