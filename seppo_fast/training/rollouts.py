"""Rollouts: what past policies drew for training.

`OneUse` has one for each slot, in memory, and forgets it after its update. `SampleSet` has a set for each iteration, in files,
and walks through it in seeded epochs.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seppo_fast.checksums import checksum_of
from seppo_fast.config import METHODS
from seppo_fast.configfile import Batch, Config
from seppo_fast.data.order import Order
from seppo_fast.disk import complete_or_not, follow_umask
from seppo_fast.errors import UserError
from seppo_fast.ranks import Ranks
from seppo_fast.reference.batching import chunks, even
from seppo_fast.reference.pool import Pool, pick
from seppo_fast.seeds import generator
from seppo_fast.training.checkpoint import State
from seppo_fast.training.folder import RunFolder
from seppo_fast.training.pairs import Rollout
from seppo_fast.training.resumption import fixed


def not_finite(batch: Mapping[str, Tensor]) -> dict[int, str]:
    """By place in a batch of samples (B, ...), which of them is not finite: the "loser", or else the "winner" made of it."""
    found: dict[int, str] = {}
    for name in filter(batch.__contains__, ("loser", "winner")):
        for i in (~batch[name].flatten(1).isfinite().all(1)).nonzero().flatten().tolist():
            found.setdefault(i, name)
    return found


def blame(names: Iterable[str]) -> str:
    """What drew the samples that are not finite, from the names of their tensors, and what to do."""
    count = Counter(names)
    lines = []
    if count["loser"]:
        lines.append(f"{count['loser']} are so as a past policy drew them: lower optimizer.params.lr, if training destroyed that"
                     " policy, or else seppo.sampler.guidance_scale")
    if count["winner"]:
        lines.append(f"{count['winner']} became so in the improvement model: check the model in seppo.improvement.path, or lower"
                     " seppo.improvement.guidance_scale and image_guidance_scale")
    return "; ".join([*lines, "bf16 and fp32 have a larger range than fp16"])


def owns(batch: Batch, rank: int, slot: int) -> bool:
    """Whether a rank trains on a slot: each has an equal share of an update's, one after another."""
    return slot % batch.size // (batch.size // batch.world) == rank


class OneUse(dict[int, Rollout]):
    """A rollout for each slot of an update, drawn for it alone."""

    def __init__(self, unused: Mapping[int, Rollout] | None = None, ranks: Ranks | None = None) -> None:
        super().__init__(unused or {})
        self._ranks = ranks

    @property
    def unused(self) -> dict[int, Rollout]:
        """What a checkpoint must hold."""
        return self

    def number(self, slot: int) -> int:
        """The sample that a slot trains on: its prompt and noise follow from this number."""
        return slot

    def missing(self, k: int, window: Sequence[int], most: int) -> list[Sequence[int]]:
        """The slots of a window that have none, in batches of at most `most`, equally many on each rank. Every rank must call.

        What another number of ranks drew before a stop is not shared out equally. Each step asks all ranks for signals, so a rank
        that lacks fewer draws some again, which changes nothing.
        """
        lacking = [slot for slot in window if slot not in self]
        most_lacking = len(lacking) if self._ranks is None else self._ranks.largest(len(lacking))
        again = [slot for slot in window if slot in self][: most_lacking - len(lacking)]
        return list(chunks(lacking + again, even(len(window), most)))

    def add(self, numbers: Sequence[int], drawn: dict[str, Tensor]) -> None:
        """Take a batch in: of each name a tensor (B, ...)."""
        for i, slot in enumerate(numbers):
            self.setdefault(slot, {name: tensor[i] for name, tensor in drawn.items()})

    def forget(self, slots: Iterable[int]) -> None:
        """These slots' update is made."""
        for slot in slots:
            self.pop(slot, None)

    def not_finite(self, slots: Iterable[int]) -> list[str]:
        """For each of these slots' rollouts that is not finite, the name of the tensor."""
        return [name for slot in slots if slot in self
                for name in not_finite({name: tensor[None] for name, tensor in self[slot].items()}).values()]


def split(batches: Sequence[Sequence[int]], rank: int, world: int) -> Sequence[Sequence[int]]:
    """A rank's share of some batches: those that follow each other, and the last ranks may have fewer."""
    share = -(-len(batches) // world)
    return batches[rank * share : (rank + 1) * share]


class SampleSet:
    """`size` samples for each iteration, an equal share drawn by each rank, in `folder/iteration_00001/`.

    A file holds a batch, is complete or absent, and says what drew it: the answer of `origin(k)`. What is damaged, or of another
    origin, is drawn anew, by whichever ranks there are now. A sample that is not finite is dropped. Reading maps one file at a
    time, so that memory does not grow with the set.
    """

    unused: dict[int, Rollout] = {}  # a checkpoint refers to the files

    def __init__(self, folder: Path, size: int, slots_per_iteration: int, least: int, seed: int, ranks: Ranks,
                 origin: Callable[[int], dict[str, Any]], say: Callable[[str], None]) -> None:
        self.folder, self.size, self.slots_per_iteration, self.least = folder, size, slots_per_iteration, least
        self.seed, self.ranks, self.origin, self.say = seed, ranks, origin, say
        self.share = self.batch = 0  # how the set was shared out when it was first drawn, and the samples of a file
        self.iteration: int | None = None  # the one whose set is complete
        self._walk(1, range(size))
        self._batches: list[Sequence[int]] = []  # the files' samples
        self._own: set[int] = set()  # the first numbers of the files that this rank writes
        # By the first number of a file that is known to be right: which samples are not finite, and in what.
        self._dropped: dict[int, dict[int, str]] = {}

    def number(self, slot: int) -> int:
        """The sample that a slot trains on: its prompt and noise follow from this number. Before its set is drawn, a guess."""
        iteration, place = divmod(slot, self.slots_per_iteration)
        if self._order_of != iteration + 1:
            self._walk(iteration + 1, range(self.size))
        return iteration * self.size + self._order.row(place)

    def missing(self, k: int, window: Sequence[int], most: int) -> list[Sequence[int]]:
        """What this rank has to draw for iteration k, in batches; empty once every rank has drawn. Every rank must call.

        Equally many batches on each rank, because each step asks all ranks for signals: one that has fewer draws another's, too,
        which changes nothing.
        """
        if self.iteration == k:
            return []
        if self.iteration is not None or not self._batches:
            self.iteration, self._dropped = None, {}
            share = -(-self.size // self.ranks.world)
            self.share, self.batch = self.ranks.from_first(self._as_drawn(k) or (share, even(share, most)))
            first = (k - 1) * self.size
            self._batches = [batch for start in range(0, self.size, self.share) for batch in
                             chunks(range(first + start, first + min(start + self.share, self.size)), self.batch)]
        self._agree()
        unknown = [batch for batch in self._batches if batch[0] not in self._dropped]
        for batch in split(unknown, self.ranks.rank, self.ranks.world):
            self._check(k, batch)
        self._agree()
        lacking = [batch for batch in self._batches if batch[0] not in self._dropped]
        if not lacking:
            self._open(k)
            return []
        own = split(lacking, self.ranks.rank, self.ranks.world)
        self._own = {batch[0] for batch in own}
        return [*own, *[lacking[0]] * (-(-len(lacking) // self.ranks.world) - len(own))]

    def add(self, numbers: Sequence[int], drawn: dict[str, Tensor]) -> None:
        """Write a batch: of each name a tensor (B, ...)."""
        if numbers[0] not in self._own:  # another rank writes it
            return
        k = numbers[0] // self.size + 1
        path = self._path(numbers[0])
        tensors = {name: tensor.contiguous() for name, tensor in drawn.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with complete_or_not(path) as temporary:
                # One key of metadata: safetensors writes several in no fixed order, and the bytes must repeat.
                save_file(tensors, temporary, {"rollouts": json.dumps(self._written(k, numbers, tensors), sort_keys=True)})
                follow_umask([temporary])
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: the samples of iteration {k} cannot be written ({error}); make room under {self.folder} and"
                            " resume: the checkpoints so far are valid, and what is drawn is not drawn again") from error
        self._dropped[numbers[0]] = {numbers[i]: name for i, name in not_finite(tensors).items()}

    def get(self, slot: int, default: Rollout | None = None, /) -> Rollout:
        """The rollout that a slot trains on, in epochs over the set."""
        number = self.number(slot)
        place = number % self.size
        start = place % self.share // self.batch * self.batch  # of its file, within its rank's share
        first = number - (place % self.share - start)
        try:
            with safe_open(self._path(first), framework="pt") as file:
                rollout = {name: file.get_slice(name)[number - first] for name in file.keys()}
        except (OSError, SafetensorError, IndexError) as error:
            raise UserError(f"{self._path(first)}: cannot be read ({error}); go on with --resume auto, which draws it"
                            " again") from error
        return rollout | {"number": torch.tensor(number)}

    def forget(self, slots: Iterable[int]) -> None:
        """Each sample is used again."""

    def not_finite(self, slots: Iterable[int]) -> list[str]:
        """None is used."""
        return []

    def remove_old(self, iterations: Iterable[int]) -> None:
        """Remove the sets of all iterations but these, those of the kept checkpoints and the present one."""
        kept = {self._folder(k).name for k in iterations}
        for path in self.folder.glob("iteration_*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _agree(self) -> None:
        """Tell all ranks which files are known to be right."""
        for each in self.ranks.objects(self._dropped):
            self._dropped |= each

    def _open(self, k: int) -> None:
        """Iteration k's set is complete: which of it is usable."""
        dropped = {number: name for some in self._dropped.values() for number, name in some.items()}
        first = (k - 1) * self.size
        usable = [place for place in range(self.size) if first + place not in dropped]
        if dropped:
            self.say(f"iteration {k}: {len(dropped)} of {self.size} samples are not finite, and are dropped")
        if len(usable) < self.least:
            raise UserError(f"iteration {k}: only {len(usable)} of {self.size} samples are finite, fewer than the {self.least}"
                            f" pairs of an update. Of the others {blame(dropped.values())}")
        self.iteration = k
        self._walk(k, usable)

    def _walk(self, k: int, usable: Sequence[int]) -> None:
        """Iteration k goes through these places of its set, in seeded epochs."""
        self._order_of, self._order = k, Order(self.size, generator(self.seed, "samples", k).initial_seed(), usable)

    def _check(self, k: int, numbers: Sequence[int]) -> None:
        """Enter a batch's file among those that are known to be right, if it is there, as it was written, and of this origin."""
        try:
            with safe_open(self._path(numbers[0]), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                written = json.loads((file.metadata() or {}).get("rollouts", "null"))
        except (OSError, SafetensorError, ValueError):
            return
        if written == self._written(k, numbers, tensors):
            self._dropped[numbers[0]] = {numbers[i]: name for i, name in not_finite(tensors).items()}

    def _written(self, k: int, numbers: Sequence[int], tensors: dict[str, Tensor]) -> dict[str, Any]:
        """What a file says of itself."""
        sums = {name: checksum_of(tensor.numpy()) for name, tensor in sorted(tensors.items())}
        return {"origin": self.origin(k), "samples": [numbers[0], numbers[-1]], "share": self.share, "batch": self.batch,
                "xxh3_128": sums}

    def _as_drawn(self, k: int) -> tuple[int, int] | None:
        """Share and batch of iteration k's files, where there are some already: a resumed run may have others."""
        for path in sorted(self._folder(k).glob("[0-9]*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    written = json.loads((file.metadata() or {})["rollouts"])
                share, batch = written["share"], written["batch"]
                if written["origin"] == self.origin(k) and 0 < batch <= share <= self.size:
                    return int(share), int(batch)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError):
                continue
        return None

    def _folder(self, k: int) -> Path:
        return self.folder / f"iteration_{k:05d}"

    def _path(self, first: int) -> Path:
        """The file whose first sample is this."""
        return self._folder(first // self.size + 1) / f"{first:010d}.safetensors"


def open_rollouts(unused: dict[int, Rollout], config: Config, batch: Batch, folder: RunFolder, state: State, pool: Pool,
                  ranks: Ranks) -> OneUse | SampleSet:
    """Where rollouts are kept; `unused` are those of the checkpoint from which the run goes on."""
    ours = config.seppo
    strategy, seed = ours.reference, ours.seed
    if ours.sampler.samples_per_iteration is None or strategy is None:
        return OneUse(unused, ranks)
    # Until its first checkpoint a run may be begun anew, with other settings, data or models in the same folder.
    settings = json.dumps([fixed(state.config), state.content or state.data, state.models], sort_keys=True)

    def origin(k: int) -> dict[str, str]:
        """What draws in iteration k."""
        drawer = k - 1 if METHODS[ours.method].losers == "latest" else pick(strategy, k, seed)
        return {"run": folder.run_id, "settings": checksum_of(settings.encode()),
                "policy": pool.checksums[pool.path(drawer).name]}

    return SampleSet(folder.path / "rollouts", ours.sampler.samples_per_iteration, ours.updates_per_iteration * batch.size,
                     batch.size, ours.seed, ranks, origin, ranks.say)
