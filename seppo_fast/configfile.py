"""The configuration file: found by name or path, overridden by --set, checked key by key, parsed once."""

import copy
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from seppo_fast.config import Seppo
from seppo_fast.errors import UserError

CONFIGS = Path(__file__).parent / "configs"

# DeepSpeed reads its dictionary with `.get`, so a mistyped key of its own would be ignored without a word.
DEEPSPEED_KEYS = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler fp16 bf16
    torch_autocast gradient_clipping zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    communication_data_type prescale_gradients gradient_predivide_factor disable_allgather data_types
    activation_checkpointing aio checkpoint compile tensorboard wandb csv_monitor comet comms_logger flops_profiler
    steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_python_gc timers log_level""".split()
)


@dataclass(frozen=True)
class Config:
    """A run's configuration: DeepSpeed's part as the dictionary it takes, ours as typed sections."""

    deepspeed: Mapping[str, Any]
    seppo: Seppo

    def as_dict(self) -> dict[str, Any]:
        """The resolved configuration, as written to the run folder and compared on resume."""
        return {**copy.deepcopy(dict(self.deepspeed)), "seppo": self.seppo.model_dump(mode="json")}


@dataclass(frozen=True)
class Batch:
    """How the effective batch is made: `size = micro * accumulation * world` pairs per optimizer update."""

    size: int
    micro: int
    accumulation: int
    world: int


def load_config(name: str, overrides: Iterable[str] = ()) -> Config:
    """Read `name` (a path, or a file of seppo_fast/configs), apply `key.path=value` overrides, check every key."""
    path = Path(name) if Path(name).is_file() else CONFIGS / name
    if not path.is_file():
        shipped = ", ".join(sorted(file.name for file in CONFIGS.glob("*.json")))
        raise UserError(f"--config {name}: no such file, and none of the shipped ones ({shipped})")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object at the top level, got {type(raw).__name__}")
    for override in overrides:
        _set(raw, override)
    return parse_config(raw)


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Check a configuration dictionary and make it a `Config`; every problem names the key, what is expected, a near key."""
    problems = [_unknown(key, key, DEEPSPEED_KEYS | {"seppo"}) for key in raw if key not in DEEPSPEED_KEYS | {"seppo"}]
    problems += _deepspeed_problems(raw)
    seppo = None
    if "seppo" not in raw:
        problems.append('seppo: this section is missing; it needs at least {"model": {"path": ...}}')
    else:
        try:
            seppo = Seppo.model_validate(raw["seppo"])
        except ValidationError as error:
            problems += [_explain(item) for item in error.errors()]
    if problems or seppo is None:
        raise UserError("the configuration has " + _count(len(problems)) + ":\n  " + "\n  ".join(problems))
    return Config({key: value for key, value in raw.items() if key != "seppo"}, seppo)


def batch_plan(deepspeed: Mapping[str, Any], world: int) -> Batch:
    """The effective batch on `world` ranks, from any two of DeepSpeed's three batch keys."""
    size, micro, accumulation = (
        deepspeed.get(key)
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if size is None:
        micro = micro or 1
        accumulation = accumulation or 1
        size = micro * accumulation * world
    elif micro is None:
        accumulation = accumulation or 1
        micro = size // (accumulation * world)
    else:
        accumulation = accumulation or size // (micro * world)
    if micro * accumulation * world != size or not size:
        raise UserError(
            f"train_batch_size {size} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps"
            f" {accumulation} x {world} rank{'s' * (world > 1)} = {micro * accumulation * world};"
            " give two of the three keys, or numbers that multiply out"
        )
    return Batch(size, micro, accumulation, world)


def _set(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override}: expected key.path=value, e.g. seppo.sampler.steps=20")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, last = path.split(".")
    node = raw
    for depth, key in enumerate(parents):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {'.'.join(parents[: depth + 1])} is not a section")
    node[last] = value


def _deepspeed_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = raw.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            problems.append(f"{key}: expected a whole number above 0 (got {value!r})")
    optimizer = raw.get("optimizer")
    if not isinstance(optimizer, dict) or "type" not in optimizer:
        problems.append('optimizer: expected {"type": "AdamW", "params": {"lr": ...}}' + f" (got {optimizer!r})")
    else:
        params = optimizer.get("params", {})
        rate = params.get("lr") if isinstance(params, dict) else None
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not rate > 0:
            problems.append(f"optimizer.params.lr: expected a number above 0 (got {rate!r})")
    enabled = [key for key in ("bf16", "fp16", "torch_autocast") if _is_enabled(raw.get(key))]
    if len(enabled) > 1:
        problems.append(f"{' and '.join(enabled)} are both enabled: choose one")
    return problems


def _is_enabled(section: Any) -> bool:
    return isinstance(section, dict) and bool(section.get("enabled"))


def _explain(item: Mapping[str, Any]) -> str:
    """One pydantic error as a line: the key's full path, what is wrong, what was got, and a near key where it is unknown."""
    path = ".".join(["seppo", *map(str, item["loc"])])
    if item["type"] == "extra_forbidden":
        section = _section(item["loc"][:-1])
        return _unknown(path, str(item["loc"][-1]), section.model_fields if section else ())
    if item["type"] == "missing":
        return f"{path}: this key is missing"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected a value")
    return f"{path}: {message}" + ("" if item["type"] == "value_error" else f" (got {item['input']!r})")


def _unknown(path: str, name: str, siblings: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, siblings, n=1)
    prefix = path[: len(path) - len(name)]
    # A key that is right but in the wrong place has no near sibling: look for its name everywhere.
    everywhere = near or [p for p in sorted(_paths(Seppo, "seppo.") | DEEPSPEED_KEYS) if p.split(".")[-1] == name]
    hint = prefix + near[0] if near else everywhere[0] if everywhere else None
    return f"{path}: unknown key" + (f"; did you mean {hint}?" if hint else "")


def _section(location: Iterable[Any]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Seppo
    for key in location:
        section = section and _nested(section.model_fields[key].annotation) if key in section.model_fields else None
    return section


def _nested(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *get_args(annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _paths(section: type[BaseModel], prefix: str) -> set[str]:
    paths = set()
    for name, field in section.model_fields.items():
        nested = _nested(field.annotation)
        paths |= {prefix + name} | (_paths(nested, f"{prefix}{name}.") if nested else set())
    return paths


def _count(number: int) -> str:
    return "a problem" if number == 1 else f"{number} problems"
