"""Checks a component's configuration against the types that its class declares: libraries accept a text as true, -1 as a count."""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from seppo_fast.errors import UserError

NOUNS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
NEEDED = ("layer_norm_eps", "projection_dim", "eos_token_id")  # although declared as optional
FROM_ZERO = ("downsample_padding", "steps_offset", "dual_attention_layers")
MOST, MOST_LAYERS = 1_000_000, 200
ADVICE = "Take the published model's file"


def check_values(file: Path, config: Mapping[str, Any], kind: type) -> None:
    """Refuse values of another type than `kind` declares for its arguments of these names, and impossible counts and sizes."""
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in config and (wanted := _lacking(name, config[name], parameter)):
            shown = repr(config[name])
            raise UserError(f"{file}: {name} is {shown[:60]}{'...' * (len(shown) > 60)}, where {wanted} is expected. {ADVICE}.")


def _lacking(name: str, value: Any, parameter: inspect.Parameter) -> str:
    """What is expected in place of a value, as text; "" where the value is right, or cannot be judged."""
    alone, listed = _kinds(parameter.annotation)
    # published models have null for some switches that are off
    optional = NoneType in alone or parameter.default is None
    needed = name in NEEDED and parameter.default is not None  # a language model's class has null itself
    if value is None and (optional and not needed or bool in alone and not parameter.default):
        return ""
    if name == "eos_token_id" and needed:  # declared for generation, where there may be several
        listed = set()
    if value == [] and isinstance(parameter.default, list | tuple) and not parameter.default:  # SD3.5 Large's dual_attention_layers
        return ""
    kinds = [kind for kind in NOUNS if kind in (listed if isinstance(value, list) else alone)]
    known = [kind for kind in NOUNS if kind in alone | listed]
    if not known:
        return ""
    items = list(_items(value))
    if not items or not all(any(_is(item, kind) for kind in kinds) for item in items):
        words = [NOUNS[kind] for kind in known if kind in alone]
        words += [f"a list, each {NOUNS[kind]}" for kind in known if kind in listed]
        return " or ".join(words)
    return next(filter(None, (_bound(name, item, float not in kinds) for item in items)), "")


def _bound(name: str, value: Any, counts: bool) -> str:
    """The range that a number is outside of, as text; `counts`: the number counts something. "" where it has no range."""
    if isinstance(value, bool | str | None):
        return ""
    if name == "freq_shift":
        return "" if value in (0, 1) else "0 or 1"
    if counts:
        least = 0 if name in FROM_ZERO or name.endswith("_token_id") or "transformer_layers" in name else 1
        most = MOST_LAYERS if "layers" in name else MOST
        return "" if least <= value <= most else f"a number from {least} to {most}"
    if name.endswith("eps"):
        return "" if 0 < value <= 0.1 else "a small number above 0"
    if name.endswith(("scaling_factor", "scale_factor")):
        return "" if 1e-3 <= value <= 1e3 else "a number from 0.001 to 1000"
    if "dropout" in name:
        return "" if 0 <= value < 1 else "a number from 0 to below 1"
    return ""


def _is(value: Any, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, bool) or value in (0, 1)
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _kinds(annotation: Any) -> tuple[set[Any], set[Any]]:
    """The types that a value may have, and those of items in a list, however deep.

    For literals only their type counts: a class may be given another class's configuration, which has other words.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        pairs = [_kinds(each) for each in inner]
        return set().union(*(pair[0] for pair in pairs)), set().union(*(pair[1] for pair in pairs))
    if origin in (list, tuple) or annotation in (list, tuple):
        pairs = [_kinds(each) for each in inner]
        return set(), set().union(*(pair[0] | pair[1] for pair in pairs))
    return ({type(each) for each in inner} if origin is Literal else {annotation}), set()


def _items(value: Any) -> Iterator[Any]:
    """The items in lists of lists, or the value itself; an empty list is an item, whose type is never right."""
    if isinstance(value, list) and value:
        for each in value:
            yield from _items(each)
    else:
        yield value
