"""A trainer that times its phases and stops after a few updates."""

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn
from torch.profiler import record_function

from seppo_fast.config import METHODS
from seppo_fast.configfile import Config, batch_plan, parse_config
from seppo_fast.errors import UserError
from seppo_fast.planning.cost import samples_of_a_pair
from seppo_fast.profiling.report import (
    PHASES,
    Operator,
    advice,
    communication,
    operator_table,
    operators,
    phase_table,
)
from seppo_fast.profiling.waiting import activity, waiting
from seppo_fast.ranks import Ranks
from seppo_fast.reference.batching import even
from seppo_fast.run import run
from seppo_fast.signals import StopSignals
from seppo_fast.training.engine import Step
from seppo_fast.training.objective import Noised, Objective
from seppo_fast.training.trainer import Trainer

TRAINING = ("policy forward", "reference scoring", "backward", "optimizer step")  # phases of a micro-batch, the last of an update
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "flops_profiler")


class Enough(BaseException):
    """Everything has been measured. Like `Stop` not an `Exception`, so that no code handles it as a failure."""


class Clock:
    """Seconds by phase, without those of phases inside it. The clock waits for the device at each change."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._wait = torch.cuda.synchronize if cuda else lambda: None
        self._marked: Callable[[str], AbstractContextManager] = record_function if cuda else nullcontext
        self._stack: list[str] = ["other"]
        self.restart()

    def restart(self) -> None:
        """Forget what was measured."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._wait()
        self._mark = time.perf_counter()

    def enter(self, phase: str) -> None:
        """Begin `phase`."""
        self.charge()
        self._stack.append(phase)

    def leave(self) -> None:
        """Return to the phase around this one."""
        self.charge()
        self._stack.pop()

    def charge(self) -> None:
        """Count the time since the last change."""
        self._wait()
        now = time.perf_counter()
        self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._mark
        self._mark = now

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """`function`, with its time counted in `phase`, which is marked in a profile of a GPU."""
        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            try:
                with self._marked(phase):
                    result = function(*args, **kwargs)
                    self._wait()
                return result
            finally:
                self.leave()
        return measured


@dataclass(frozen=True)
class TimedObjective(Objective):
    """The objective with a clock around each network's forward. No hooks on the networks: they may be captured or compiled."""

    clock: Clock | None = None
    policy: DeepSpeedEngine | None = None

    def _predict(self, module: nn.Module, noised: Noised) -> Tensor:
        phase = "policy forward" if module is self.policy else "reference scoring"
        return self.clock.timed(super()._predict, phase)(module, noised)


@dataclass
class ProfiledTrainer(Trainer):
    """One update to warm up, `updates` with the clock, one with the profiler; `Enough` ends it. Writes no checkpoint."""

    updates: int = 3
    found: dict[str, Any] = field(default_factory=dict)

    def train(self) -> None:
        """Algorithm 1 until enough is measured."""
        self.clock = Clock(self.ranks.device)
        self.profiler: torch.profiler.profile | None = None
        self.engine.backward = self.clock.timed(self.engine.backward, "backward")
        self.engine.step = self.stepped(self.clock.timed(self.engine.step, "optimizer step"))
        self.objective = TimedObjective(**vars(self.objective), clock=self.clock, policy=self.engine)
        super().train()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count a phase of the trainer. Inside "training", the networks, the backward and the step have their own phases."""
        self.clock.enter("loss and bookkeeping" if name == "training" else name)
        try:
            with super().timed(name):
                yield
        finally:
            self.clock.leave()

    @property
    def last(self) -> bool:
        """Whether this is the update with the profiler."""
        return self.state.update == self.updates + 1

    def draw_rollouts(self, k: int, update: int) -> None:
        """Line 3; in the last update, one batch is drawn again under the profiler."""
        if self.state.update == 1:
            self.clock.restart()
        super().draw_rollouts(k, update)
        if self.last and self.reference is not None and METHODS[self.settings.method].draws:
            slots = list(self.slots(update))
            slots = slots[:even(len(slots), self.reference.batch_size)]
            noise, conditions = self.pairs.initial_noise(slots), self.pairs.prompts(slots)
            with (self.reference.on_device(), self.improver.on_device() if self.improver else nullcontext(),
                  new_profiler() as profiler):
                draw = self.clock.timed(self.reference.sampler.draw, "sampling")
                losers = draw(noise, conditions, later=partial(self.pairs.later_noise, slots))
                if self.improver:
                    self.clock.timed(self.improver.improve, "sampling")(losers, conditions, noise)
            self.found["sampling"] = operators(profiler, self.ranks.device), len(slots)
            self.note_activity(profiler, "sampling")

    def update_policy(self, update: int) -> tuple[Step, Tensor]:
        """Line 4; in the last update, its last micro-batch runs under the profiler."""
        self.micro_batches = 0
        self.profile_last_micro_batch()
        done = super().update_policy(update)
        if self.profiler:
            self.profiler.__exit__(None, None, None)
            self.found["training"] = operators(self.profiler, self.ranks.device), self.batch.micro
            self.note_activity(self.profiler, *TRAINING)
        return done

    def note_activity(self, profiler: torch.profiler.profile, *phases: str) -> None:
        """Keep what the GPU did in these phases of a profile."""
        if self.ranks.device.type == "cuda":
            self.found.setdefault("activity", {}).update(activity(profiler.events(), phases))

    def stepped(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`engine.step`, which ends a micro-batch."""
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.micro_batches += 1
            self.profile_last_micro_batch()
            return result
        return counted

    def profile_last_micro_batch(self) -> None:
        """Start the profiler before the last micro-batch of the last update."""
        if self.last and self.micro_batches == self.batch.accumulation - 1:
            self.profiler = new_profiler().__enter__()

    def finish_update(self, k: int, done: Step, table: Tensor) -> None:
        """Count the update; the clock stops before the last one."""
        super().finish_update(k, done, table)
        if self.state.update == self.updates + 1:
            self.clock.charge()
            self.found["seconds"] = {name: value / self.updates for name, value in self.clock.seconds.items()}
        if self.state.update == self.updates + 2:
            raise Enough

    def save(self) -> Path:
        """No checkpoint."""
        return self.folder


def new_profiler() -> torch.profiler.profile:
    """Of the CPU and, where there is one, of the GPU."""
    return torch.profiler.profile(activities=list(torch.profiler.supported_activities()), acc_events=True)


def profile(config: Config, ranks: Ranks, signals: StopSignals, updates: int, rows: int = 15) -> str:
    """Train for `updates` measured updates in a temporary folder beside the run's own; every rank calls."""
    with temporary_folder(Path(config.seppo.output_dir), ranks) as folder:
        short = shortened(config, folder, updates)
        trainers: list[ProfiledTrainer] = []

        def build(**parts: Any) -> ProfiledTrainer:
            trainers.append(ProfiledTrainer(**parts, updates=updates))
            return trainers[0]

        try:
            run(short, None, ranks, signals, build)
        except Enough:
            pass
        found = trainers[0].found
        everyone = ranks.gather(torch.tensor([[found["seconds"][name] for name in PHASES]], dtype=torch.double))
    everyone[:, PHASES.index("sampling")] *= samples_of_a_pair(config.seppo, batch_plan(config.deepspeed, ranks.world))
    seconds = {name: value for name, value in zip(PHASES, everyone.mean(dim=0).tolist(), strict=True) if value}
    sampling = everyone[:, PHASES.index("sampling")]
    uneven = (sampling.max() / sampling.mean()).item() - 1 if sampling.max() > 0 else 0.0
    return report(config, ranks, seconds, uneven, found, updates, rows)


def report(config: Config, ranks: Ranks, seconds: dict[str, float], uneven: float, found: dict[str, Any], updates: int,
           rows: int) -> str:
    """All results, as text."""
    batch = batch_plan(config.deepspeed, ranks.world)
    stage = int(config.deepspeed.get("zero_optimization", {}).get("stage", 0))
    parts = [phase_table(seconds, batch, updates, uneven)]
    if (share := samples_of_a_pair(config.seppo, batch)) != 1:
        parts.append(f"a sample is used {1 / share:.3g} times (sampler.samples_per_iteration): of the time of drawing one for each"
                     f" pair, {share:.3g} is counted as sampling")
    collectives = 0.0
    for name, what in (("sampling", "samples in one batch"), ("training", "pairs in one micro-batch, with the optimizer step")):
        if name in found:
            table: list[Operator]
            table, count = found[name]
            parts.append(operator_table(table, f"{name}, {count} {what}", rows))
    if batch.world > 1:
        # From stage 2 on gradients are reduced in every micro-batch, below once an update.
        collectives = communication(found["training"][0]) * (batch.accumulation if stage >= 2 else 1) / sum(seconds.values())
        parts.append(f"collectives: about {collectives:.1%} of an update, waiting for other ranks and what overlaps included")
    idle: dict[str, float] = {}
    if "activity" in found:
        idle, table_of_idle = waiting(found, batch, config.seppo.sampler.steps)
        parts.append(table_of_idle)
    lines = advice(seconds, config, batch, ranks.device.type == "cuda", collectives, idle)
    return "\n\n".join([*parts, "\n".join(["what to turn on, by what was measured:", *(f"- {line}" for line in lines)])])


def shortened(config: Config, folder: Path, updates: int) -> Config:
    """The configuration for `updates` + 2 updates that leave nothing behind.

    It has no monitors, grids or scores, and no iteration ends. Samples are made for one update at a time, one a pair: those of a
    whole iteration would all be made before the first update.
    """
    raw = copy.deepcopy(config.as_dict())
    for monitor in MONITORS:
        raw.pop(monitor, None)
    raw["seppo"].update(output_dir=str(folder / "run"), iterations=1, updates_per_iteration=updates + 3)
    raw["seppo"]["samples"]["every"] = 0
    raw["seppo"]["evaluation"] = {}
    raw["seppo"]["data"]["hold_out"] = None
    raw["seppo"]["sampler"].update(window="update", samples_per_iteration=None)
    return parse_config(raw)


@contextmanager
def temporary_folder(output: Path, ranks: Ranks) -> Iterator[Path]:
    """A temporary folder that all ranks see, in the nearest existing parent of `output`; rank 0 removes it."""
    beside = next(parent for parent in output.absolute().parents if parent.is_dir())
    made: list[object] = [None]
    if ranks.rank == 0:
        try:
            made = [Path(tempfile.mkdtemp(prefix=f".{output.name}-profile-", dir=beside))]
        except OSError as error:
            made = [error]
    if ranks.world > 1:
        dist.broadcast_object_list(made, src=0, group=ranks.control)
    folder, = made
    if not isinstance(folder, Path):
        raise UserError(f"seppo.output_dir: no temporary folder can be made in {beside} ({folder})")
    try:
        yield folder
    finally:
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
