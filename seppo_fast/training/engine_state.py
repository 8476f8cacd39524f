"""What DeepSpeed's engine trains with, by the weights' names: written by any number of ranks at any ZeRO stage, read by any other.

    engine.json           the engine's counters, schedule and loss scale, the optimizer's settings, the weights' shapes
    rank_0.safetensors    a rank's share: pieces of the weights as the optimizer holds them ("master:NAME"), and of its state for
                          them ("exp_avg:NAME"); the metadata says where in its weight each piece begins, and counts the steps

DeepSpeed's universal checkpoints would do less and ask more: a second command has to make them of its shards, they are pickles
whose code is run, and at stage 3 they know Adam's state alone. Its `safe_get_full_*` sum over the ranks, a weight after another: a
negative zero becomes a zero, and every rank waits for every weight. Here each rank writes what it holds, and reads what it needs
from whichever files have it. Nobody waits, and no more than a piece is in memory twice.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seppo_fast.errors import UserError, few, reason
from seppo_fast.models.lora import trainable_weights
from seppo_fast.ranks import Ranks
from seppo_fast.training.held import Held, Piece, held, inner_optimizer, is_shared_out
from seppo_fast.training.marker import Written, first_problem, listed
from seppo_fast.training.tensor_files import write_flat

ENGINE = "engine.json"
MASTER = "master"
INSTEAD = "go on from an earlier checkpoint with --resume PATH"
COUNTERS = ("global_steps", "skipped_steps", "global_samples")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what changes of fp16's loss scale
COUNTS = ("step", "mu_product", "eta", "mu")  # of torch's optimizers: numbers, also where the weight itself is one
# Optimizers that are one: which of them trains depends on the device and on the optimizer's offload.
ALIKE = ({"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}, {"FusedLion", "DeepSpeedCPULion"})


class About(BaseModel):
    """engine.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    optimizer: str
    weights: dict[str, list[int]]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None
    scaler: dict[str, float | int] | None
    counters: dict[str, int]


def save(engine: DeepSpeedEngine, folder: Path, ranks: Ranks) -> dict[str, Written]:
    """Write this rank's share into `folder`, and rank 0 engine.json; returns what was written, by name. No rank waits."""
    optimizer, mine = inner_optimizer(engine), held(engine)
    if not is_shared_out(engine):
        mine = mine[ranks.rank :: ranks.world]
    tensors: dict[str, Tensor] = {}
    about = []
    for each in mine:
        state, counts = parted(optimizer, each.master)
        about.append({"starts": {piece.name: piece.start for piece in each.pieces}, "counts": counts})
        for key, whole in {MASTER: each.master, **state}.items():
            tensors |= {f"{key}:{piece.name}": piece.of(whole) for piece in each.pieces}
    own = folder / f"rank_{ranks.rank}.safetensors"
    written = {own.name: write_flat(own, tensors, about)}
    if ranks.rank == 0:
        (folder / ENGINE).write_text(json.dumps(_about(engine), indent=1), encoding="utf-8")
    return written


def _about(engine: DeepSpeedEngine) -> dict[str, Any]:
    scheduler, scaler = engine.lr_scheduler, getattr(engine.optimizer, "loss_scaler", None)
    groups = [{key: value for key, value in group.items() if key not in ("params", "param_names")}
              for group in engine.optimizer.param_groups]
    try:
        return {
            "optimizer": type(inner_optimizer(engine)).__name__,
            "weights": {name: list(shape) for name, shape in shapes(engine).items()},
            "groups": [as_json(group) for group in groups],
            "scheduler": None if scheduler is None else as_json(scheduler.state_dict()),
            "scaler": None if scaler is None else {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)},
            "counters": {name: getattr(engine, name) for name in COUNTERS},
        }
    except TypeError as error:
        raise UserError(f"a checkpoint holds tensors, numbers and text, but the optimizer's settings or the schedule hold {error},"
                        " which could not be read again: choose another optimizer or scheduler") from None


def shapes(engine: DeepSpeedEngine) -> dict[str, tuple[int, ...]]:
    """The shapes of the trained weights by name, whole also where ZeRO-3 has cut them into pieces."""
    return {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in trainable_weights(engine.module).items()}


def parted(optimizer: torch.optim.Optimizer, master: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state for a tensor: what it has for each of its values, and numbers, as JSON has them."""
    state, counts = dict[str, Tensor](), dict[str, Any]()
    for key, value in optimizer.state.get(master, {}).items():
        if isinstance(value, Tensor) and value.dim() == 0 and (master.dim() > 0 or key in COUNTS):
            counts[key] = {"dtype": str(value.dtype).removeprefix("torch."), "value": value.item()}
        elif isinstance(value, Tensor) and value.shape == master.shape:
            state[key] = value
        elif value is None or isinstance(value, bool | int | float):
            counts[key] = value
        else:
            kind = f"a tensor of the shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"optimizer.type: {type(optimizer).__name__} keeps {key!r}, {kind}, for a weight of the shape"
                            f" {tuple(master.shape)}; a checkpoint can hold a number, or a number for each of a weight's values:"
                            " choose another optimizer")
    return state, counts


def load(engine: DeepSpeedEngine, folder: Path) -> None:
    """Train on with what `save` wrote; every rank must call. `UserError` where it is not whole, or of other weights."""
    try:
        about = About.model_validate_json((folder / ENGINE).read_bytes())
        check(engine, folder, about)
        with ExitStack() as opened:
            saved = Saved(folder, {name: tuple(shape) for name, shape in about.weights.items()}, opened)
            for each in held(engine):
                _fill(engine, each, saved, same_class=about.optimizer == type(inner_optimizer(engine)).__name__)
    except ValidationError as error:
        raise UserError(f"{folder}: its {ENGINE} cannot be read ({first_problem(error)}); {INSTEAD}") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} cannot be read ({reason(error)}); {INSTEAD}") from error
    for group, then in zip(engine.optimizer.param_groups, about.groups, strict=True):
        group.update({key: as_before(value, group[key]) for key, value in then.items() if key in group})
    if engine.lr_scheduler is not None and about.scheduler is not None:
        now = engine.lr_scheduler.state_dict()
        engine.lr_scheduler.load_state_dict(now | {key: as_before(value, now.get(key)) for key, value in about.scheduler.items()})
    for name, value in (about.scaler or {}).items():
        if hasattr(scaler := getattr(engine.optimizer, "loss_scaler", None), name):
            setattr(scaler, name, value)
    for name in COUNTERS:
        setattr(engine, name, about.counters[name])
    follow_masters(engine)


def check(engine: DeepSpeedEngine, folder: Path, about: About) -> None:
    """Refuse the state of other weights, or of another optimizer."""
    needed, found = shapes(engine), {name: tuple(shape) for name, shape in about.weights.items()}
    for problem, names in (("lacks", needed.keys() - found.keys()), ("has beside them", found.keys() - needed.keys()),
                           ("has in another shape", {name for name in needed if found.get(name, needed[name]) != needed[name]})):
        if names:
            raise UserError(f"{folder} is of another model or another seppo.model.lora: of the weights that are trained here it"
                            f" {problem} {few(sorted(names))}")
    now = type(inner_optimizer(engine)).__name__
    if now != about.optimizer and not any({now, about.optimizer} <= alike for alike in ALIKE):
        raise UserError(f"{folder} has the state of the optimizer {about.optimizer}, and this run's is {now}: they keep different"
                        " things; use the optimizer of then, with its offload")
    if len(about.groups) != len(engine.optimizer.param_groups):
        raise UserError(f"{folder} has {len(about.groups)} groups of weights, and this run's optimizer has"
                        f" {len(engine.optimizer.param_groups)}; {INSTEAD}")


class Saved:
    """The ranks' shares of a checkpoint, opened: pieces by key and weight, in the order in which they follow each other."""

    def __init__(self, folder: Path, weights: Mapping[str, tuple[int, ...]], opened: ExitStack) -> None:
        self.folder = folder
        self.pieces: dict[str, dict[str, list[tuple[int, int, Any]]]] = {name: {} for name in weights}
        self.counts: dict[str, dict[str, Any]] = {}
        for name in sorted(listed(folder)):  # and no other: only what the marker lists was written with the rest
            if name.startswith("rank_") and name.endswith(".safetensors"):
                self._add(name, opened.enter_context(safe_open(folder / name, framework="pt")))
        for name, shape in weights.items():
            for key, pieces in self.pieces[name].items():
                pieces.sort(key=lambda piece: piece[:2])
                ends = [0, *(end for _, end, _ in pieces)]
                if [start for start, _, _ in pieces] != ends[:-1] or ends[-1] != torch.Size(shape).numel():
                    raise ValueError(f"its files lack a part of {key} of {name}")
            if MASTER not in self.pieces[name]:
                raise ValueError(f"its files lack {name}")

    def _add(self, file_name: str, file: Any) -> None:
        starts: dict[str, int] = {}
        for each in json.loads(file.metadata()["about"]):
            starts |= each["starts"]
            for name in each["starts"]:
                if self.counts.setdefault(name, each["counts"]) != each["counts"]:
                    raise ValueError(f"{file_name} counts other steps of {name} than another file")
        for entry in file.keys():
            key, _, name = entry.partition(":")
            (size,) = file.get_slice(entry).get_shape()
            self.pieces[name].setdefault(key, []).append((starts[name], starts[name] + size, file))

    def keys(self, name: str) -> dict[str, torch.dtype]:
        """What the optimizer kept for each value of a weight, and in which type."""
        return {key: next(iter(pieces))[2].get_slice(f"{key}:{name}")[:0].dtype for key, pieces in self.pieces[name].items()
                if key != MASTER}

    def read(self, key: str, piece: Piece) -> Iterator[tuple[int, Tensor]]:
        """The parts of a piece, each with the place in the piece where it begins."""
        stop = piece.start + piece.count
        for start, end, file in self.pieces[piece.name].get(key, ()):
            if max(start, piece.start) < min(end, stop):
                left = max(start, piece.start)
                yield left - piece.start, file.get_slice(f"{key}:{piece.name}")[left - start : min(end, stop) - start]


@torch.no_grad()
def _fill(engine: DeepSpeedEngine, each: Held, saved: Saved, same_class: bool) -> None:
    """Put the weights and the state that were saved into a tensor of the optimizer's."""
    optimizer = inner_optimizer(engine)
    _put(each.master, MASTER, each.pieces, saved)
    keys = {key: dtype for piece in each.pieces for key, dtype in saved.keys(piece.name).items()}
    counts = [saved.counts[piece.name] for piece in each.pieces if saved.counts[piece.name] or saved.keys(piece.name)]
    if not keys and not any(counts):
        return  # no step was made yet
    if different := [piece.name for piece in each.pieces if (saved.counts[piece.name] or counts[0]) != counts[0]]:
        raise UserError(f"{saved.folder}: the optimizer made other numbers of steps for {few(different)} than for other weights,"
                        " which ZeRO would count together: resume at the stage of then")
    state = optimizer.state.get(each.master, {})  # some make it when they begin
    for key, dtype in keys.items():
        if key not in state:
            state[key] = torch.zeros_like(each.master, dtype=dtype if same_class else each.master.dtype)
        _put(state[key], key, each.pieces, saved)
    of_deepspeed = type(optimizer).__module__.startswith("deepspeed")
    state |= {key: _number(value, key, each.master, optimizer.param_groups[each.group], of_deepspeed)
              for key, value in counts[0].items()}
    optimizer.state[each.master] = state


def _put(target: Tensor, key: str, pieces: tuple[Piece, ...], saved: Saved) -> None:
    for piece in pieces:
        own = piece.of(target)
        if own.dim() == 1:
            for offset, part in saved.read(key, piece):
                own[offset : offset + len(part)].copy_(part)
        elif parts := [part for _, part in saved.read(key, piece)]:  # a whole weight, whose layout in memory may be another
            own.copy_(torch.cat(parts).view(own.shape))


def _number(value: Any, key: str, master: Tensor, group: Mapping[str, Any], of_deepspeed: bool) -> Any:
    """A number as this optimizer keeps it: DeepSpeed's count in Python, torch's in tensors, of which `step` stays on the CPU."""
    if of_deepspeed:
        return int(value["value"]) if isinstance(value, dict) else value
    if type(value) is int and key == "step":
        value = {"dtype": "float32", "value": value}
    if not isinstance(value, dict):
        return value
    on_device = key != "step" or group.get("capturable") or group.get("fused")
    return torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]), device=master.device if on_device else "cpu")


@torch.no_grad()
def follow_masters(engine: DeepSpeedEngine) -> None:
    """Give the network the weights that the optimizer holds, as after a step; every rank must call."""
    optimizer = engine.optimizer
    if engine.zero_optimization_partition_weights():
        optimizer.checkpoint_event_prologue()
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer.checkpoint_event_epilogue()
    elif is_shared_out(engine):
        optimizer.update_lp_params()


def as_json(value: Any) -> Any:
    """A value of numbers, texts, lists and mappings as JSON has it; `TypeError` names the type of anything else."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: as_json(item) for key, item in value.items()}
        return {"items": [[as_json(key), as_json(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__}")


def as_before(saved: Any, now: Any) -> Any:
    """A value that JSON gave back, in the type of the present one."""
    if isinstance(now, tuple) and isinstance(saved, list):
        return tuple(saved)
    if isinstance(now, Mapping) and isinstance(saved, dict) and saved.keys() == {"items"}:
        kind: Callable[[dict[Any, Any]], Any] = Counter if isinstance(now, Counter) else dict
        return kind({key: item for key, item in saved["items"]})
    return saved
