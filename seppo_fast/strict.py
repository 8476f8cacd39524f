"""JSON and CSV headers, read strictly: a name that is given twice is an error, where other readers take the last value."""

import json
from collections.abc import Iterable
from typing import Any

from seppo_fast.errors import UserError


class GivenTwice(ValueError):
    """A name is given more than once in one object."""


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with `GivenTwice` where an object has a key twice; every error is a ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def unlike_header(values: int, names: int) -> str:
    """What is wrong with a CSV row that has more or fewer values than the header has names."""
    more = "; is a text with a comma in it not in quotes?" if values > names else "; are some missing, or is the line cut off?"
    return f"{values} value{'s' * (values != 1)} where the header has {names} name{'s' * (names != 1)}{more}"


def check_columns(names: Iterable[str], where: str) -> None:
    """`UserError` when a table has a column twice; columns without a name do not count."""
    again = twice(filter(None, names))
    if again:
        raise UserError(f"{where} has the column {', '.join(again)} twice; rename or remove one, so that it is clear which counts")


def twice(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, sorted."""
    seen: set[str] = set()
    return sorted({name for name in names if name in seen or seen.add(name)})


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    again = twice(name for name, _ in pairs)
    if again:
        raise GivenTwice(f"{', '.join(again)} is given twice in the same section; JSON would silently take the last value")
    return dict(pairs)
