"""Checkpoints: complete or ignored. Tensors as safetensors, the rest as JSON, then a marker. Any number of ranks goes on with them.

    checkpoints/update_00000030/
        engine.json              DeepSpeed's counters and schedule, the optimizer's settings (`engine_state.py`)
        rank_0.safetensors       weights and optimizer state by name; one file a rank
        rollouts_0.safetensors   a rank's rollouts that are not used yet, by slot, where it has some
        policy.safetensors       the trainable weights, for people and other programs
        state.json               how far the run was, of which configuration and data
        complete.json            every file with its size and checksum, written last

No random states: each draw has a generator of its own, and dropout's is seeded for each update and rank. With dropout and another
number of ranks, its masks are others.
"""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from seppo_fast.disk import flush, flush_tree, follow_umask
from seppo_fast.errors import UserError, reason
from seppo_fast.ranks import Ranks
from seppo_fast.training import engine_state
from seppo_fast.training.beta import Margins
from seppo_fast.training.contents import Stamps
from seppo_fast.training.divergence import REMEMBERED, largest_in_range
from seppo_fast.training.engine import policy_weights
from seppo_fast.training.marker import MARKER, damaged, declare, differs, first_problem, listed, missing
from seppo_fast.training.pairs import Rollout

POLICY = "policy.safetensors"


@dataclass
class State:
    """How far a run is. `update` counts completed optimizer updates, skipped ones included.

    `unmoved`: all updates of the iteration so far were skipped, and the policy is the pool's latest. `evaluated` is the update
    of the last evaluation, `best` the best value of the watched score and `best_update` that policy's, `not_better` how many
    evaluations have come since. `sound` is the newest policy, by its updates, whose error on the winners was in its range, and
    `errors` are the last ones in range (`divergence.py`). `margins` decide beta where it is "auto".
    """

    run_id: str
    world: int
    data: str | None  # the cache's fingerprint
    config: dict[str, Any]
    update: int = 0
    skipped: int = 0
    nonfinite_in_a_row: int = 0
    unmoved: bool = True
    evaluated: int | None = None
    best: float | None = None
    best_update: int | None = None
    not_better: int = 0
    content: str | None = None  # a digest of the data, without their files' times
    pool: dict[str, str] = field(default_factory=dict)  # checksums of the past policies' files, by name
    sound: int | None = None  # None in a state that an earlier version wrote
    errors: list[float] = field(default_factory=list)
    started_from: str | None = None  # seppo.model.start_from's file and its checksum
    heldout_error: float | None = None  # the initial model's on the held-out winners
    models: dict[str, str] = field(default_factory=dict)  # checksums of the models' files, by their key
    stamps: Stamps = field(default_factory=dict)  # and which files they were: what has not changed is not read again
    margins: Margins = Margins()

    __pydantic_config__ = ConfigDict(extra="forbid")

    def judge(self, value: float | None, better: str) -> None:
        """Count an evaluation of the present policy; None, a score without a value, is never better."""
        self.evaluated = self.update
        ahead = value is not None and (self.best is None or (value > self.best if better == "higher" else value < self.best))
        if ahead:
            self.best, self.best_update = value, self.update
        self.not_better = 0 if ahead else self.not_better + 1

    def watch(self, error: float) -> bool:
        """Record the winners' error of the update that was just counted; returns whether it is in range."""
        if not error <= min(largest_in_range(self.errors), sys.float_info.max):
            return False
        self.sound = self.update - 1  # an update's error is that of the policy before it
        self.errors = [*self.errors, error][-REMEMBERED:]
        return True

    @property
    def diverged(self) -> bool:
        """Whether the last update's error was out of its range."""
        return self.sound is not None and self.sound < self.update - 1

    def compare_anew(self) -> None:
        """Forget the best value: from the next evaluation on something else is measured."""
        self.best, self.best_update, self.not_better = None, None, 0


def save(folder: Path, engine: DeepSpeedEngine, state: State, rollouts: dict[int, Rollout], ranks: Ranks, keep_last: int,
         keep_best: bool = False) -> Path:
    """Write a checkpoint; every rank must call. A crash, a kill or a full disk leaves the earlier ones as they were.

    The newest `keep_last` stay, with `keep_best` the best policy's, and the newest one that is known to be sound. A checkpoint's
    name counts the updates, and the slots for which there are rollouts already: the later one sorts last.
    """
    held = sum(ranks.objects(len(rollouts)))
    final = folder / (f"update_{state.update:08d}" + (f"_{held:08d}" if held else ""))
    if ranks.largest(ranks.rank == 0 and missing(final) is None):  # one rank decides: file systems may lag on another machine
        return final
    temporary = folder / f".{final.name}.tmp"
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    weights = policy_weights(engine, keep=ranks.rank == 0)
    with _clear_errors(final):
        written = engine_state.save(engine, temporary, ranks)
        if rollouts:
            save_file(_by_slot(rollouts), temporary / f"rollouts_{ranks.rank}.safetensors")
        if ranks.rank == 0:
            save_file(weights, temporary / POLICY)
            (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1))
    everyones = ranks.objects(written)
    if ranks.rank == 0:
        with _clear_errors(final):
            follow_umask(temporary.glob("*.safetensors"))
            flush_tree(temporary)
            declare(temporary, {name: file for each in everyones for name, file in each.items()})
            flush(temporary / MARKER)
            flush(temporary)
            temporary.rename(final)
            flush(folder)
            remove_old(folder, state, keep_last, keep_best, last_sound(folder, state))
    ranks.barrier()
    return final


def remove_old(folder: Path, state: State, keep_last: int, keep_best: bool, also: Path | None = None) -> None:
    """Remove all complete checkpoints but the newest `keep_last`, the best policy's where it is wanted, and `also`."""
    best = of_update(folder, state.best_update) if keep_best else []
    for old in complete(folder)[:-keep_last]:
        if old not in best and old != also:
            shutil.rmtree(old)


def last_sound(folder: Path, state: State) -> Path | None:
    """The newest complete checkpoint of a policy whose error on the winners was in its range."""
    good = [path for path in complete(folder) if state.sound is None or update_of(path) <= state.sound]
    return good[-1] if good else None


@contextmanager
def _clear_errors(final: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # a full disk is either, by who was writing
        previous = complete(final.parent)
        valid = f"the last complete checkpoint is {previous[-1]}" if previous else "there is no complete checkpoint yet"
        raise UserError(f"could not write the checkpoint {final}: {error}; {valid}. Free some space (lower"
                        " seppo.checkpoint.keep_last) and resume with --resume auto") from error


def load(path: Path, engine: DeepSpeedEngine, owns: Callable[[int], bool]) -> dict[int, Rollout]:
    """Restore the engine; returns the rollouts that are not used yet of the slots that this rank owns, whichever rank made them.

    Every rank must call. Check `flaw` and `state_of` first.
    """
    engine_state.load(engine, path)
    found: dict[int, Rollout] = {}
    for name in sorted(listed(path)):
        if not (name.startswith("rollouts_") and name.endswith(".safetensors")):
            continue
        try:
            with safe_open(path / name, framework="pt") as file:
                slots = file.get_tensor("slots").tolist()
                made = {entry.removeprefix("made."): file.get_slice(entry) for entry in file.keys() if entry != "slots"}
                found |= {slot: {entry: rows[i] for entry, rows in made.items()} for i, slot in enumerate(slots) if owns(slot)}
        except (OSError, SafetensorError, TypeError, IndexError) as error:
            raise UserError(f"{path / name} cannot be read ({reason(error)}); {engine_state.INSTEAD}") from error
    return found


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in _named(folder) if missing(path) is None]


def of_update(folder: Path, update: int | None) -> list[Path]:
    """The complete checkpoints of the policy after this many updates; a stop in the middle of the next update adds a second one."""
    return [] if update is None else [path for path in complete(folder) if update_of(path) == update]


def update_of(path: Path) -> int:
    """The updates that the policy of a checkpoint has had, by its name."""
    return int(path.name.split("_")[1])


def torn(folder: Path) -> list[tuple[Path, str]]:
    """Checkpoints that are not complete, with what they lack."""
    return [(path, lack) for path in _named(folder) if (lack := missing(path)) is not None]


def _named(folder: Path) -> list[Path]:
    """Paths with a checkpoint's name, oldest first; copies under other names are ignored."""
    try:
        return sorted(path for path in folder.iterdir() if re.fullmatch(r"update_\d{8,}(_\d{8,})?", path.name))
    except FileNotFoundError:
        return []
    except OSError as error:  # not "none": a run would begin anew, and its pool with it
        raise UserError(f"{folder} cannot be read ({error.strerror})") from None


def flaw(path: Path, ranks: Ranks) -> str | None:
    """What is damaged in a complete checkpoint, or None; every rank must call, and all get the same answer."""
    return next(filter(None, ranks.objects(damaged(path, ranks.rank, ranks.world) or _unreadable(path))), None)


def _unreadable(path: Path) -> str | None:
    """Damage to state.json, also in checkpoints without checksums; or None."""
    try:
        read_state(path)
    except ValueError as error:
        return str(error)
    return None


def policy_of(path: Path) -> dict[str, Tensor]:
    """The trained weights of a complete checkpoint as they were written, or a `UserError`."""
    file = path / POLICY
    try:
        lack = differs(path, POLICY, listed(path)[POLICY])
        if lack is None:
            return load_file(file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        lack = reason(error)
    raise UserError(f"{file} cannot be read: {lack}")


def set_aside_later(path: Path) -> None:
    """Rename the complete checkpoints after `path`: the resumed run must neither resume from them nor count them as its own."""
    for later in [other for other in complete(path.parent) if other.name > path.name]:
        aside = later.with_name(f"set_aside_{later.name}")
        shutil.rmtree(aside, ignore_errors=True)
        later.rename(aside)
        print(f"set aside the later checkpoint {later.name} as {aside}: remove it when it is not needed", flush=True)


def anew(path: Path) -> str:
    """Advice for a message: how to begin a new run with the weights of a checkpoint that cannot be resumed."""
    return (f"to begin anew from its weights, repeat the command without --resume and with --set"
            f" seppo.model.start_from={shlex.quote(str(path))} seppo.output_dir=ANOTHER_FOLDER")


def read_state(path: Path) -> State:
    """What state.json says; `ValueError` says what is wrong with it."""
    try:
        return TypeAdapter(State).validate_json((path / "state.json").read_bytes(), strict=True)
    except OSError as error:
        raise ValueError(f"its state.json cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise ValueError(f"its state.json cannot be read ({first_problem(error)})") from None


def _by_slot(rollouts: dict[int, Rollout]) -> dict[str, Tensor]:
    slots = sorted(rollouts)
    return {"slots": torch.tensor(slots)} | {f"made.{name}": torch.stack([rollouts[slot][name] for slot in slots])
                                             for name in rollouts[slots[0]]}
