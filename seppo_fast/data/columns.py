"""Columns of a table (parquet, `datasets`) or of metadata: which are image, loser and caption, and what a row holds."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import datasets
import pyarrow as pa
from huggingface_hub import constants
from PIL import Image

from seppo_fast import config
from seppo_fast.data.pairs import LOSERS, PAIRS, PLAIN, Use, each
from seppo_fast.data.rows import BadRow, ImageLike, Row, Skipped, Tie, checked_caption, embedded, inside, printable
from seppo_fast.errors import UserError

Kind = Literal["content", "text"]
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "file_name")
CAPTIONS = ("text", "caption", "prompt")
MOST_LISTED = 30  # columns in a message
PAIR = ("jpg_0", "jpg_1", "label_0")
FETCHED = (Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))


@dataclass(frozen=True)
class Columns:
    """Where a row's parts are. `image` is None for Pick-a-Pic pairs (`PAIR`), whose label tells the winner.

    `loser` is the column of the other image where the run takes something of it.
    """

    image: str | None
    caption: str
    loser: str | None = None
    use: Use = Use()
    folder: Path | None = None
    has_label: bool = False
    outside: bool = False

    def named(self) -> dict[str, str]:
        """What goes into the cache's fingerprint."""
        return {"image": self.image or "+".join(PAIR), "caption": self.caption} | ({"loser": self.loser} if self.loser else {})

    def needed(self) -> list[str]:
        """The columns to read from disk."""
        images = [self.image] if self.image else [*PAIR, *(["has_label"] if self.has_label else [])]
        return [*images, *([self.loser] if self.loser else []), self.caption]

    def row(self, key: str, record: dict[str, Any]) -> Row | Skipped:
        """One record as a row, or why it cannot be used."""
        key = printable(key)
        try:
            images = each(self.images(key, record), lambda name: as_image(record.get(name), self.folder, self.outside))
            return Row(key, checked_caption(record.get(self.caption)), *images)
        except BadRow as bad:
            return Skipped(key, str(bad), isinstance(bad, Tie))

    def images(self, key: str, record: dict[str, Any]) -> tuple[str, ...]:
        """The columns of the row's image, or of winner and loser; in Pick-a-Pic, as in DiffusionDPO, label_0 == 0 swaps the two."""
        if self.image is not None:
            return self.use.of(key, self.image, self.loser) if self.loser else (self.image,)
        label = record["label_0"]
        if self.has_label and record["has_label"] is False:
            raise Tie("tie: no preference was recorded (has_label is false)")
        if label == 0.5:
            raise Tie("tie: label_0 is 0.5")
        if label not in (0, 1):
            raise BadRow(f"label_0 is {label!r}, which is none of 0, 0.5, 1")
        first, second = PAIR[:2]
        return self.use.of(key, first, second) if label == 1 or self.use.choose == "random" else self.use.of(key, second, first)


def as_image(value: Any, folder: Path | None, outside: bool = False) -> ImageLike:
    """What a table may hold: bytes, `datasets`' {"bytes", "path"}, a PIL image, base64 text, or a file name under `folder`.

    Without a folder, of a hub dataset, files are those that were fetched.
    """
    if value is None:
        raise BadRow("no image")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        if value.get("path"):
            return fetched(value["path"], outside) if folder is None else inside(folder, value["path"], outside=outside)
        raise BadRow("no image")
    if (content := embedded(value)) is not None:
        return content
    if isinstance(value, str) and folder is not None:
        return inside(folder, value, outside=outside)
    raise BadRow(f"the image is {type(value).__name__}, not an image, bytes or a file name")


def fetched(name: object, outside: bool) -> Path:
    """A file that `datasets` fetched from the hub; `BadRow` for any other, unless `outside` is allowed."""
    ours = isinstance(name, str) and any(Path(os.path.normpath(name)).is_relative_to(folder) for folder in FETCHED)
    return inside(FETCHED[0], name, outside=outside or ours)


def image_columns(data: config.Data, kinds: Mapping[str, Kind | None], known: Sequence[str], use: Use, where: str
                  ) -> tuple[str, str | None]:
    """The column of the image, or of the winner, and that of the loser where there is one.

    `kinds`: what each column can hold. `known`: the names of columns with one image a row, the likeliest first. `UserError` when
    the names leave open which column is meant.
    """
    check_both(data, where)
    if data.loser_column is not None:
        pick(data.loser_column, (), list(kinds), "loser", where)
    pairs = [(winner, loser) for winner, loser in PAIRS
             if kinds.get(winner) is not None and kinds.get(winner) == kinds.get(loser)
             and data.image_column in (None, winner) and data.loser_column in (None, loser)]
    image = data.image_column or image_column(data.loser_column, pairs, kinds, known, use, where)
    pick(image, (), list(kinds), "image", where)
    losers = [data.loser_column] if data.loser_column else [loser for winner, loser in pairs if winner == image]
    if len(losers) > 1 and use.both:
        ambiguous("loser", losers, where)
    return image, losers[0] if len(losers) == 1 else None


def image_column(loser: str | None, pairs: Sequence[tuple[str, str]], kinds: Mapping[str, Kind | None], known: Sequence[str],
                 use: Use, where: str) -> str:
    """The only column that can be meant: a winner's of the `pairs`, or one of the `known` names; never a loser's."""
    winners = list(dict.fromkeys(winner for winner, _ in pairs if winner not in PLAIN))
    single = [name for name in known if name not in (*winners, *LOSERS, loser)]
    there = [name for name in single if name in kinds]
    # Beside an image, `chosen` and `rejected` as texts are mostly two answers to it.
    if there and not use.both and all(kinds[name] == "text" for name in winners):
        winners = []
    if there[:1] and there[0] in IMAGES:
        there = there[:1]
    if len(meant := [*winners, *there]) > 1:
        ambiguous("image", meant, where)
    return meant[0] if meant else pick(None, single, list(kinds), "image", where)


def check_both(data: config.Data, where: str) -> None:
    """`UserError` when winner and loser are to be of one column."""
    if data.loser_column is not None and data.loser_column == data.image_column:
        raise UserError(f"seppo.data.image_column and seppo.data.loser_column are both {data.image_column!r}; name where {where}"
                        " has the winner, and where the loser")


def ambiguous(what: str, names: Sequence[str], where: str) -> NoReturn:
    """`UserError` for several columns, each of which may be meant."""
    raise UserError(f"{where} has several columns that may hold the {what}: {printable(', '.join(names))}. Say which is meant with"
                    " seppo.data.image_column (of a pair: the winner) and, for pairs, seppo.data.loser_column")


def kind_of(type: pa.DataType) -> Kind | None:
    """How a column of this type can hold images: as content, as text (file names, base64), or not at all."""
    if pa.types.is_dictionary(type):
        return kind_of(type.value_type)
    binary = pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_fixed_size_binary(type)
    if binary or pa.types.is_struct(type):
        return "content"
    return "text" if pa.types.is_string(type) or pa.types.is_large_string(type) else None


def pick(wanted: str | None, known: Sequence[str], available: Sequence[str], what: str, where: str) -> str:
    """The configured column, else the first known one that is there; `UserError` lists those that are."""
    rest = len(available) - MOST_LISTED
    there = printable(", ".join(available[:MOST_LISTED])) + (f" and {rest} more" if rest > 0 else "")
    if wanted is not None:
        if wanted in available:
            return wanted
        raise UserError(f"seppo.data.{what}_column={wanted!r}: {where} has no such column; it has: {there}")
    for name in known:
        if name in available:
            return name
    raise UserError(f"{where} has no {what} column (looked for {', '.join(known)}); it has: {there}."
                    f" Set seppo.data.{what}_column to one of them")
