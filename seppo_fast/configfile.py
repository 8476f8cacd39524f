"""The configuration file: found by name or path, overridden by --set, checked key by key, parsed once."""

import copy
import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from seppo_fast.config import Positive, Seppo
from seppo_fast.errors import UserError
from seppo_fast.opening import read_object
from seppo_fast.sections import Fraction
from seppo_fast.strict import parse_json

CONFIGS = Path(__file__).parent / "configs"

# DeepSpeed reads its dictionary with `.get`, so a mistyped key of its own would be ignored without a word.
DEEPSPEED_KEYS = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler fp16 bf16
    torch_autocast gradient_clipping zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    communication_data_type prescale_gradients gradient_predivide_factor disable_allgather data_types
    activation_checkpointing aio compile tensorboard wandb csv_monitor comet comms_logger flops_profiler
    steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_python_gc timers log_level""".split()
)


BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
COUNTED = (*BATCH_KEYS, "optimizer.params.lr", "gradient_clipping")  # their numbers are checked elsewhere
# Keys of DeepSpeed's whose value may be any text.
FREE_TEXT = frozenset("job_name output_path project group team workspace experiment_name experiment_key api_key run_name".split())
SWITCHES = ("zero_allow_untested_optimizer zero_force_ds_cpu_optimizer prescale_gradients disable_allgather wall_clock_breakdown"
            " memory_breakdown dump_state disable_python_gc").split()


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
    raw = _read(name)
    for override in overrides:
        _set(raw, override)
    return parse_config(raw)


def given_config(config: Mapping[str, Any] | str | Path, values: Mapping[str, Any]) -> Config:
    """The checked configuration from a dictionary or a file (as `load_config` reads it), with `values` set by key path."""
    if isinstance(config, Mapping):
        raw = _as_json(config, "the configuration")
    elif isinstance(config, str | Path):
        raw = _read(os.fspath(config))
    else:
        raise UserError(f"the configuration: expected a dictionary, or a file's path (got {type(config).__name__})")
    if not isinstance(values, Mapping):
        raise UserError('set: expected a dictionary of key paths, e.g. {"seppo.sampler.steps": 20}' + f" (got {values!r})")
    for path, value in values.items():
        _put(raw, str(path), _as_json(value, f"set {path}"), f"set {path}")
    return parse_config(raw)


def _as_json(value: Any, where: str) -> Any:
    """A copy as it would come from a JSON file: tuples become lists, and paths texts."""
    try:
        return json.loads(json.dumps(value, default=os.fspath))
    except (TypeError, ValueError, RecursionError) as error:  # a type that JSON lacks, or an object that contains itself
        raise UserError(f"{where}: holds what a configuration file cannot ({error})") from None


def _read(name: str) -> dict[str, Any]:
    shipped = sorted(file.name for file in CONFIGS.glob("*.json"))
    path = CONFIGS / name if name in shipped and not os.path.isfile(name) else Path(name)
    try:
        return read_object(path)
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError) or path.is_symlink():
            raise
        raise UserError(f"--config {name}: no such file, and none of the shipped ones ({', '.join(shipped)})") from error


def parse_config(raw: Mapping[str, Any]) -> Config:
    """The `Config` of a dictionary, checked; every problem names the key, what is expected, and the nearest known key."""
    problems = [unknown(key, key, DEEPSPEED_KEYS | {"seppo"}) for key in raw if key not in DEEPSPEED_KEYS | {"seppo"}]
    problems += _deepspeed_problems(raw)
    seppo = None
    if "seppo" not in raw:
        problems.append('seppo: this section is missing; it needs at least {"model": {"path": ...}}')
    else:
        try:
            seppo = Seppo.model_validate(raw["seppo"])
        except ValidationError as error:
            problems += explain_all(error, Seppo, "seppo")
    if problems or seppo is None:
        raise UserError("the configuration has " + _count(len(problems)) + ":\n  " + "\n  ".join(problems))
    return Config({key: value for key, value in raw.items() if key != "seppo"}, seppo)


def batch_plan(deepspeed: Mapping[str, Any], world: int) -> Batch:
    """The effective batch on `world` ranks, from any two of DeepSpeed's three batch keys."""
    size, micro, accumulation = (deepspeed.get(key) for key in BATCH_KEYS)
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
        value = parse_json(text)
    except json.JSONDecodeError:
        value = text
    except ValueError as error:  # a key given twice, brackets without end, a number of thousands of digits
        raise UserError(f"--set {override[:200]}: {error}") from None
    _put(raw, path, value, f"--set {override}")


def _put(raw: dict[str, Any], path: str, value: Any, given: str) -> None:
    """Set the key at `path`; messages name what was given as `given`."""
    *parents, last = path.split(".")
    node = raw
    for depth, key in enumerate(parents):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(f"{given}: {'.'.join(parents[: depth + 1])} is not a section")
    node[last] = value


def _deepspeed_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = [line for key in raw if key != "seppo" for line in _words(key, key, raw[key])]
    problems += [f"{key}: expected true or false (got {raw[key]!r})" for key in SWITCHES if raw.get(key, False) not in (True, False)
                 and not isinstance(raw[key], str)]
    for key in BATCH_KEYS:
        value = raw.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            problems.append(f"{key}: expected a whole number above 0 (got {value!r})")
    optimizer = raw.get("optimizer")
    if not isinstance(optimizer, dict) or "type" not in optimizer:
        problems.append('optimizer: expected {"type": "AdamW", "params": {"lr": ...}}' + f" (got {optimizer!r})")
    else:
        params = optimizer.get("params", {})
        rate = params.get("lr") if isinstance(params, dict) else None
        if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < math.inf:
            problems.append(f"optimizer.params.lr: expected a number above 0 (got {rate!r})")
    clipping = raw.get("gradient_clipping", 0.0)
    if not isinstance(clipping, int | float) or isinstance(clipping, bool) or not 0 <= clipping < math.inf:
        problems.append(f"gradient_clipping: expected a number, 0 (none) or above (got {clipping!r})")
    enabled = [key for key in ("bf16", "fp16", "torch_autocast") if _is_enabled(raw.get(key))]
    if len(enabled) > 1:
        problems.append(f"{' and '.join(enabled)} are both enabled: choose one")
    return problems


def _words(path: str, key: str, value: Any) -> list[str]:
    """A line for each text in DeepSpeed's part that should be another type: DeepSpeed would take the text "False" for true."""
    if isinstance(value, Mapping):
        return [line for name, item in value.items() for line in _words(f"{path}.{name}", name, item)]
    if isinstance(value, list):
        return [line for item in value for line in _words(path, key, item)]
    if not isinstance(value, str) or key in FREE_TEXT:
        return []
    word = value.strip().lower()
    if word == "auto":
        return [f"{path}: \"auto\" is a placeholder that Hugging Face's Trainer fills in, but nothing here; give the value"
                " itself, or leave the key out"]
    switch = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(word)
    if switch is not None:
        return [f"{path}: expected {json.dumps(switch)}, not the text {value!r}"]
    try:
        float(word)
    except ValueError:
        return [f"{path}: expected true or false (got {value!r})"] if key == "enabled" else []
    return [] if path in COUNTED else [f"{path}: expected the number {word}, not the text {value!r}"]


def _is_enabled(section: Any) -> bool:
    return isinstance(section, dict) and section.get("enabled") in (True, 1)


def explain_all(error: ValidationError, root: type[BaseModel], prefix: str) -> list[str]:
    """A line for each key of `root`, whose section is `prefix`, that is wrong. For a union pydantic has one for each option."""
    lines: list[str] = []
    for item in error.errors():
        names, annotation = _field(item["loc"], root)
        options = _options(annotation)
        if len(options) > 1 and len(names) < len(item["loc"]):
            line = f"{'.'.join([prefix, *names])}: expected {', or '.join(options)} (got {item['input']!r})"
            words = [option for option in options if option.startswith('"')]
            if sorted(options) == sorted([*words, "a number"]):  # what is wrong with the number says more
                if item["type"] == "literal_error":
                    continue
                line = ", or ".join([_explain({**item, "loc": names}, root, prefix), *words])
        else:
            line = _explain(item, root, prefix)
        if line not in lines:
            lines.append(line)
    return lines


def _field(location: Sequence[Any], root: type[BaseModel]) -> tuple[list[str], Any]:
    """The keys at the start of an error's location, as far as they are fields, and the last one's annotation."""
    section: type[BaseModel] | None = root
    names: list[str] = []
    annotation: Any = None
    for name in location:
        if section is None or name not in section.model_fields:
            break
        annotation = section.model_fields[name].annotation
        names.append(name)
        section = _nested(annotation)
    return names, annotation


NOUNS = {int: "a whole number", float: "a number", str: "a text", list: "a list", bool: "true or false"}


def _options(annotation: Any) -> list[str]:
    """What a union allows, in words; empty for anything else."""
    words = []
    for option in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ():
        kind = get_args(option)[0] if get_origin(option) is Annotated else option
        if get_origin(kind) is Literal:
            words += [json.dumps(value) for value in get_args(kind)]
        elif option == Positive:
            words.append("a whole number above 0")
        elif option == Fraction:
            words.append("a share between 0 and 1")
        elif kind is not NoneType:
            words.append(NOUNS.get(get_origin(kind) or kind, str(kind)))
    return words


def _explain(item: Mapping[str, Any], root: type[BaseModel], prefix: str) -> str:
    """One pydantic error as a line: the key's full path, what is wrong, what was got, and a near key where it is unknown."""
    path = ".".join([prefix, *map(str, item["loc"])])
    if item["type"] == "extra_forbidden":
        section = _section(item["loc"][:-1], root)
        fields = section.model_fields.items() if section else ()
        return unknown(path, str(item["loc"][-1]), [field.alias or name for name, field in fields])
    if item["type"] == "missing":
        return f"{path}: this key is missing"
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{path}: expected a section, {{...}} (got {item['input']!r})"
    if item["type"] == "string_too_short":
        return f"{path}: expected a name, not an empty text"
    problem = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    for wordy, short in (("Input should be a valid ", "expected a valid "), ("Input should be greater", "expected a value greater"),
                         ("Input should be less", "expected a value less"), ("Input should be ", "expected ")):
        problem = short + problem.removeprefix(wordy) if problem.startswith(wordy) else problem
    return f"{path}: {problem}" + ("" if item["type"] == "value_error" else f" (got {item['input']!r})")


def unknown(path: str, name: str, siblings: Iterable[str]) -> str:
    """A line about a key that is not among `siblings`: its full path, and the nearest right one."""
    near = nearest(name, siblings)
    prefix = path[: len(path) - len(name)]
    # A key that is right but in the wrong place has no near sibling: look for its name everywhere.
    everywhere = [p for p in [*_paths(Seppo, "seppo."), *sorted(DEEPSPEED_KEYS)] if p.split(".")[-1] == name]
    hint = prefix + near if near else everywhere[0] if everywhere else None
    return f"{path}: unknown key" + (f"; did you mean {hint}?" if hint else "")


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option that looks most like `name`, whatever the case, or None when none does."""
    by_lower = {option.lower(): option for option in sorted(options, reverse=True)}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[near[0]] if near else None


def _section(location: Iterable[Any], root: type[BaseModel]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = root
    for key in location:
        section = _nested(section.model_fields[key].annotation) if section and key in section.model_fields else None
    return section


def _nested(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *get_args(annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _paths(section: type[BaseModel], prefix: str) -> list[str]:
    """All keys in the order in which they are declared."""
    paths = []
    for name, field in section.model_fields.items():
        nested = _nested(field.annotation)
        paths += [prefix + name, *(_paths(nested, f"{prefix}{name}.") if nested else [])]
    return paths


def _count(number: int) -> str:
    return "a problem" if number == 1 else f"{number} problems"
