"""Every key of the "seppo" section as a table, from the models in seppo_fast/config.py."""

import json
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from seppo_fast.config import Seppo

NOUNS = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null"}
BOUNDS = {Gt: ("above", "gt"), Ge: ("at least", "ge"), Lt: ("below", "lt"), Le: ("at most", "le"),
          MultipleOf: ("a multiple of", "multiple_of")}


def keys() -> str:
    """A markdown table: key with its full path, type, default, what it does."""
    return "\n".join(["| key | type | default | what it does |", "|---|---|---|---|", *_rows(Seppo, "seppo.")])


def _rows(section: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        nested = next((kind for kind in (field.annotation, *get_args(field.annotation)) if _is_section(kind)), None)
        if nested is not field.annotation:  # a section that is always there needs no row of its own
            cells = (f"`{prefix}{name}`", _type(field.annotation, field.metadata), _default(field), field.description or "")
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if nested:
            rows += _rows(nested, f"{prefix}{name}.")
    return rows


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _default(field: FieldInfo) -> str:
    return "has to be given" if field.is_required() else f"`{json.dumps(field.default)}`"


def _type(kind: Any, metadata: list[Any]) -> str:
    """A type in words, with its bounds."""
    if get_origin(kind) is Annotated:
        base, *marks = get_args(kind)
        return _type(base, [mark for each in marks for mark in getattr(each, "metadata", [each])])
    if get_origin(kind) in (Union, UnionType):
        words = [_type(option, []) for option in get_args(kind)]
        return ", ".join(words[:-1]) + f" or {words[-1]}"
    if get_origin(kind) is Literal:
        words = [f"`{json.dumps(value)}`" for value in get_args(kind)]
        return ", ".join(words[:-1]) + f" or {words[-1]}" if len(words) > 1 else words[0]
    if get_origin(kind) is list:
        return f"list of: {_type(get_args(kind)[0], [])}"
    if get_origin(kind) is dict:
        return f"section of: {_type(get_args(kind)[1], [])}"
    if _is_section(kind):
        return "section"
    bounds = [f"{words} {getattr(mark, attribute)}" for mark in metadata if type(mark) in BOUNDS
              for words, attribute in [BOUNDS[type(mark)]]]
    noun = "text, not empty" if any(isinstance(mark, MinLen) for mark in metadata) else NOUNS[kind]
    return " ".join([noun, " and ".join(bounds)]).strip()
