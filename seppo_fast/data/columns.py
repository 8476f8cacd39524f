"""Columns of a table (parquet, `datasets`) to rows: which are image and caption, and which image of a pair wins."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import constants
from PIL import Image

from seppo_fast.data.rows import BadRow, ImageLike, Row, Skipped, Tie, checked_caption, embedded, inside, printable
from seppo_fast.errors import UserError
from seppo_fast.seeds import generator

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "file_name")
CAPTIONS = ("text", "caption", "prompt")
MOST_LISTED = 30  # columns in a message
PAIR = ("jpg_0", "jpg_1", "label_0")
FETCHED = (Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))


@dataclass(frozen=True)
class Columns:
    """Where a row's parts are. `image` is None for Pick-a-Pic pairs (`PAIR`), of which `choose` picks the winner."""

    image: str | None
    caption: str
    needs_loser: bool = False
    choose: str = "winner"
    seed: int = 0
    folder: Path | None = None
    has_label: bool = False
    outside: bool = False

    def named(self) -> dict[str, str]:
        """What goes into the cache's fingerprint."""
        return {"image": self.image or "+".join(PAIR), "caption": self.caption}

    def needed(self) -> list[str]:
        """The columns to read from disk."""
        images = [self.image] if self.image else [*PAIR, *(["has_label"] if self.has_label else [])]
        return [*images, self.caption]

    def row(self, key: str, record: dict[str, Any]) -> Row | Skipped:
        """One record as a row, or why it is none."""
        key = printable(key)
        try:
            if self.image is None:
                winner, loser = self.pair(key, record)
            else:
                winner, loser = as_image(record.get(self.image), self.folder, self.outside), None
            return Row(key, checked_caption(record.get(self.caption)), winner, loser)
        except BadRow as bad:
            return Skipped(key, str(bad), isinstance(bad, Tie))

    def pair(self, key: str, record: dict[str, Any]) -> tuple[ImageLike, ImageLike | None]:
        """Winner and, where wanted, loser of a Pick-a-Pic row; as in DiffusionDPO, label_0 == 0 swaps the two."""
        label = record["label_0"]
        if self.has_label and record["has_label"] is False:
            raise Tie("tie: no preference was recorded (has_label is false)")
        if label == 0.5:
            raise Tie("tie: label_0 is 0.5")
        if label not in (0, 1):
            raise BadRow(f"label_0 is {label!r}, which is none of 0, 0.5, 1")
        first_wins = bool(label == 1)
        if self.choose == "random":
            first_wins = bool(torch.rand((), generator=generator(self.seed, "choose", key)) < 0.5)
        names = ("jpg_0", "jpg_1") if first_wins else ("jpg_1", "jpg_0")
        winner = as_image(record[names[0]], self.folder, self.outside)
        return winner, as_image(record[names[1]], self.folder, self.outside) if self.needs_loser else None


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


def pick(wanted: str | None, known: Sequence[str], available: Sequence[str], what: str, where: str) -> str:
    """The configured column, else the first known one that is there; `UserError` lists those that are."""
    rest = len(available) - MOST_LISTED
    there = printable(", ".join(available[:MOST_LISTED])) + (f" and {rest} more" if rest > 0 else "")
    if wanted is not None:
        if wanted in available:
            return wanted
        raise UserError(f"data.{what}_column={wanted!r}: {where} has no such column; it has: {there}")
    for name in known:
        if name in available:
            return name
    raise UserError(f"{where} has no {what} column (looked for {', '.join(known)}); it has: {there}."
                    f" Set data.{what}_column to one of them")


def refuse_pairs(where: str, needs_loser: bool, choose: str) -> None:
    """For sources with one image a row: `UserError` when the method or `choose` wants pairs."""
    if needs_loser:
        raise UserError(f"method 'dpo' needs pairs of images (columns {', '.join(PAIR)}, caption, as in Pick-a-Pic),"
                        f" but {where} has one image a row; method 'seppo' makes its own losers")
    if choose == "random":
        raise UserError(f"seppo.data.choose='random' picks one image of a pair, but {where} has one image a row;"
                        " set seppo.data.choose to 'winner'")
