"""Shows and measures the policy during training: grids of samples, scores of samples, errors on held-out demonstrations."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from deepspeed import DeepSpeedEngine

from seppo_fast.config import HELD_OUT, Seppo
from seppo_fast.ranks import Ranks
from seppo_fast.reference.network import Reference
from seppo_fast.signals import Stop, StopSignals
from seppo_fast.training.checkpoint import State
from seppo_fast.training.engine import policy_weights
from seppo_fast.training.held_out import HeldOut, columns
from seppo_fast.training.reporter import Reporter
from seppo_fast.training.samples import Grids
from seppo_fast.training.validation import Validation


@dataclass
class Looks:
    """What grids and evaluations need; every rank calls each method. `grids` is rank 0's alone."""

    settings: Seppo
    ranks: Ranks
    engine: DeepSpeedEngine
    reference: Reference
    grids: Grids | None
    validation: Validation | None
    held_out: HeldOut | None
    reporter: Reporter
    signals: StopSignals
    state: State

    def draw_grid(self) -> None:
        """Draw samples of the present policy from fixed prompts and noise, if it is their turn."""
        every, update = self.settings.samples.every, self.state.update
        if not every or update % every:
            return
        with self.policy_in_reference(here=self.grids is not None):
            if self.grids is not None:
                with suppress(Stop):  # it draws alone: all ranks stop together, at the next check
                    draw = partial(self.reference.shown.draw, before_step=self.signals.check_alone)
                    self.reporter.grid(update, self.grids.write(update, draw))

    def draw_missing_grid(self) -> None:
        """Draw this update's grid if the run is new, or stopped before the grid was drawn."""
        update = self.state.update
        if self.ranks.largest(self.grids is not None and (update == 0 or not self.grids.drawn(update))):
            self.draw_grid()

    def evaluate(self) -> None:
        """Measure the present policy at its turn, unless that is done; a resumed run begins with what a stop interrupted."""
        every, update = self.settings.evaluation.every, self.state.update
        if not every or update % every or self.state.evaluated == update:
            return
        started, watched, check = time.perf_counter(), self.settings.evaluation.watched, self._check
        row: dict[str, Any] = {}
        better = dict.fromkeys(HELD_OUT, "higher")
        notes: list[str] = []
        if self.held_out is not None and not self.held_out.ready and self.settings.reference is not None:
            with self.reference.on_device():
                self.reference.pool.load_into(0, self.reference.module)
                self.held_out.prepare(self.reference, check)
        with self.policy_in_reference():
            if self.validation is not None:
                row, notes = self.validation(update, self.reference, check)
                better |= self.validation.better
            if self.held_out is not None:
                error, accuracy = self.held_out(self.reference.module, check)
                if update == 0:
                    self.state.heldout_error = error
                row |= columns(error, accuracy, self.state.heldout_error)
        self.state.judge(row.get(watched if watched in HELD_OUT else f"eval_{watched}"), better[watched])
        seconds = round(time.perf_counter() - started, 4)
        self.reporter.evaluation({"update": update, **row, "seconds_evaluation": seconds}, notes)

    def _check(self) -> None:
        self.signals.check_now_and_then(self.ranks, "evaluation")

    @contextmanager
    def policy_in_reference(self, here: bool = True) -> Iterator[None]:
        """The reference's network holds the policy's weights on ranks that are `here`; the others wait."""
        weights = policy_weights(self.engine, keep=here)
        if here:
            with self.reference.holding(weights):
                yield
        else:
            yield
        self.ranks.barrier()
