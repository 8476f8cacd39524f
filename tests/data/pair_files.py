"""Preference pairs in every form that is read, for the tests of the data section."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
from data.data_files import image_bytes, pair, write_parquet, write_tar

from seppo_fast.data.rows import Row, read_bytes

Write = Callable[[Path], Path]
COUNT = 5
WINNERS = [image_bytes(2 * i) for i in range(COUNT)]
LOSERS = [image_bytes(2 * i + 1) for i in range(COUNT)]


def put(folder: Path, images: list[bytes], end: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        (folder / f"{i}{end}").write_bytes(image)
    return folder


def metadata(folder: Path, *rows: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pickapic(folder: Path) -> Path:
    return write_parquet(folder / "p.parquet", [pair(i, 1.0) for i in range(COUNT)])


def two_columns(winner: str, loser: str) -> Write:
    def write(folder: Path) -> Path:
        rows = [{loser: LOSERS[i], winner: WINNERS[i], "text": f"pair {i}"} for i in range(COUNT)]
        return write_parquet(folder / "p.parquet", rows)
    return write


def dataset(winner: str, loser: str) -> Write:
    def write(folder: Path) -> Path:
        rows = [{loser: {"bytes": LOSERS[i], "path": None}, winner: {"bytes": WINNERS[i], "path": None}, "prompt": f"pair {i}"}
                for i in range(COUNT)]
        made = datasets.Dataset.from_list(rows).cast_column(loser, datasets.Image()).cast_column(winner, datasets.Image())
        made.save_to_disk(folder / "d")
        return folder / "d"
    return write


def named_files(winner: str, loser: str) -> Write:
    def write(folder: Path) -> Path:
        put(put(folder, WINNERS), LOSERS, ".bad.png")
        return metadata(folder, *({winner: f"{i}.png", loser: f"{i}.bad.png", "text": f"pair {i}"} for i in range(COUNT)))
    return write


def folders(winner: str, loser: str, name: str = "{}.png") -> Write:
    def write(folder: Path) -> Path:
        put(folder / winner, WINNERS), put(folder / loser, LOSERS)
        return metadata(folder, *({"file_name": name.format(i), "text": f"pair {i}"} for i in range(COUNT)))
    return write


def metadata_each(folder: Path) -> Path:
    for name, images in (("winner", WINNERS), ("loser", LOSERS)):
        metadata(put(folder / "train" / name, images), *({"file_name": f"{i}.png", "text": f"pair {i}"} for i in range(COUNT)))
    return folder


def captions(folder: Path) -> Path:
    put(folder / "train" / "rejected", LOSERS)
    put(put(folder / "train" / "chosen", WINNERS), [f"pair {i}".encode() for i in range(COUNT)], ".txt")
    return folder


def tar(ending: str) -> Write:
    def write(folder: Path) -> Path:
        return write_tar(folder / "a.tar", [member for i in range(COUNT) for member in (
            (f"{i}.{ending}", LOSERS[i]), (f"{i}.png", WINNERS[i]), (f"{i}.txt", f"pair {i}".encode()))])
    return write


FORMS = {
    "pick-a-pic": (pickapic, {}), "parquet": (two_columns("chosen", "rejected"), {}),
    "parquet winner": (two_columns("winner", "loser"), {}), "beside an image": (two_columns("image", "rejected"), {}),
    "parquet named": (two_columns("a", "b"), {"image_column": "a", "loser_column": "b"}),
    "parquet half named": (two_columns("jpg", "worse"), {"loser_column": "worse"}),
    "datasets": (dataset("chosen", "rejected"), {}), "datasets of an image folder": (dataset("image", "loser"), {}),
    "datasets half named": (dataset("good", "bad"), {"loser_column": "bad"}),
    "loser_file_name": (named_files("file_name", "loser_file_name"), {}),
    "two file names": (named_files("chosen_file_name", "rejected_file_name"), {}),
    "file names named": (named_files("a", "b"), {"image_column": "a", "loser_column": "b"}),
    "two folders": (folders("chosen", "rejected"), {}), "two folders by path": (folders("winners", "losers", "winners/{}.png"), {}),
    "two folders with metadata": (metadata_each, {}), "two folders with captions": (captions, {}),
    "tar": (tar("loser.png"), {}), "tar rejected": (tar("rejected.png"), {}),
    "tar named": (tar("b.png"), {"image_column": "png", "loser_column": "b.png"}),
}


def contents(row: Row) -> tuple[bytes, ...]:
    return tuple(read_bytes(image) if isinstance(image, Path) else image for image in (row.image, row.loser) if image is not None)
