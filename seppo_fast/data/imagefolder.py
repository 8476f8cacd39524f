"""A folder of images with metadata.jsonl or metadata.csv files (the `datasets` imagefolder convention).

Of a pair, either a second column names the loser's file (`file_name`, `loser_file_name`), or winner and loser have the same name
in two folders beside one another (`chosen/1.png`, `rejected/1.png`).
"""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path, PurePosixPath

from seppo_fast import config
from seppo_fast.data.columns import CAPTIONS, image_columns, pick
from seppo_fast.data.metadata import NAMES, Layout, Span, identity, metadata_files, named, records, scan_all
from seppo_fast.data.pairs import BACK, FOLDERS, PAIRS, Use, beside, each, refuse_single
from seppo_fast.data.rows import (
    BadRow,
    ImageLike,
    Part,
    Row,
    Skipped,
    Source,
    checked_caption,
    embedded,
    inside,
    looks_embedded,
    short,
)
from seppo_fast.data.splits import ALL, split_of_folders
from seppo_fast.errors import UserError

FILES = ("file_name", "image")  # columns that name a file
WINNERS = tuple(dict.fromkeys((*FILES, *(winner for winner, _ in PAIRS))))
LOOK_AT = 16  # rows of a part that tell in which folders the files are
REMEDY = ("name each loser in a column 'loser_file_name' (or seppo.data.loser_column), or put winners and losers under the same"
          " names into folders 'chosen' and 'rejected' beside one another")


def open_imagefolder(folder: Path, data: config.Data, use: Use, only: Path | None = None) -> Source:
    """Images named in the folder's and its sub-folders' metadata files (or in `only` one), in parts of 256 rows."""
    files = [only] if only else without_losers(metadata_files(folder), folder)
    where = str(files[0]) if len(files) == 1 else f"the metadata under {folder}"
    names = (data.image_column,) if data.image_column else WINNERS
    found = scan_all(files, folder, names, data.split, where)
    if not found.spans:
        raise UserError(f"{where} has no rows; it wants one per image: a file_name and a text")
    image, loser = image_columns(data, dict.fromkeys(found.columns, "text"), FILES, use, where)
    winners = {file: names_folder(file, header, image) for file, header in found.headers.items()}
    losers = {file: place if place == file.parent else beside(place, folder) for file, place in winners.items()}
    caption = pick(data.caption_column, CAPTIONS, found.columns, "caption", where)

    def locate_image(file: Path, record: dict, key: str) -> tuple[ImageLike]:
        return (named_image(record.get(image), winners[file], data.allow_outside),)

    def locate_pair(file: Path, record: dict, key: str) -> list[ImageLike]:
        def one(column: str) -> ImageLike:
            if column == loser:
                check_split(record.get(column), data.split, found.splits)
            return named_image(record.get(column), (losers if column == loser else winners)[file], data.allow_outside)

        return each(use.of(key, image, loser), one)

    spans, told = [span for span, _ in found.spans], {"image": image, "caption": caption}
    layout = Layout(folder, caption, found.headers, locate_image, names, data.split, found.splits)
    if loser is None:
        layout = with_folders(layout, spans, use, f"the image folder {folder}")
    elif use.both:
        layout = replace(layout, locate=locate_pair)
    if use.both:
        told["loser"] = loser or "folder"
    parts = [Part(f"{span.file.relative_to(folder)}:{span.line}", count, lambda span=span: rows(span, layout))
             for span, count in found.spans]
    return Source(str(folder), "imagefolder", told, parts, lambda: identity(spans, layout))


def named_image(name: object, place: Path, outside: bool) -> ImageLike:
    """The file of this name in a folder, or the image that the text itself is; `BadRow` for neither."""
    return embedded(name) or inside(place, name, outside=outside)


def check_split(name: object, split: str, splits: Collection[str | None]) -> None:
    """`BadRow` for a loser in a folder of another split than is read."""
    if not isinstance(name, str) or looks_embedded(name):
        return
    told = split_of_folders(PurePosixPath(name).parent.parts, split)
    if split != ALL and told not in (None, *splits):
        raise BadRow(f"{short(name)} is of the split {told}")


def without_losers(files: Sequence[Path], root: Path) -> list[Path]:
    """The metadata files without those in losers' folders whose winners' folder has a metadata file, too."""
    return [file for file in files
            if (other := beside(file.parent, root, BACK)) is None or not any(other / name in files for name in NAMES)]


def names_folder(file: Path, header: list[str] | None, column: str) -> Path:
    """The folder that a metadata file's names are relative to: its own, or a folder of winners in it, where the files are."""
    places = [file.parent / winners for winners, losers in FOLDERS.items()
              if (file.parent / winners).is_dir() and (file.parent / losers).is_dir()]
    if places:
        found = [record.get(column) for _, _, record in islice(records(Span(file, 0, 1, 0), header), LOOK_AT)
                 if isinstance(record, dict)]
        for place in (file.parent, *places):
            if any(is_there(place, name) for name in found):
                return place
    return file.parent


def is_there(place: Path, name: object) -> bool:
    """Whether a folder has a file of this name."""
    try:
        return os.path.lexists(inside(place, name))
    except BadRow:
        return False


def with_folders(layout: Layout, spans: Sequence[Span], use: Use, where: str) -> Layout:
    """The layout where folders may say who wins: a loser has its winner's name in the folder beside, and is no row of its own.

    `UserError` where the run needs pairs and there are none.
    """
    losers_of, winners_of = (lru_cache(maxsize=None)(partial(beside, root=layout.root, names=names)) for names in (FOLDERS, BACK))

    def locate(file: Path, record: dict, key: str) -> Sequence[ImageLike]:
        (image,) = layout.locate(file, record, key)
        place = image.parent if isinstance(image, Path) else None
        if place and winners_of(place):
            raise BadRow(f"{shown(image)} is in the losers' folder beside the winners'; a row names the winner")
        if not use.both:
            return (image,)
        if not (losers := place and losers_of(place)):
            raise BadRow(f"no loser: {shown(image)} is in no folder of winners ({', '.join(FOLDERS)}) with the losers' beside it")
        return use.of(key, image, inside(losers, image.name))

    def shown(image: ImageLike) -> str:
        return short(os.path.relpath(image, layout.root)) if isinstance(image, Path) else "an embedded image"

    found = replace(layout, locate=locate)
    if use.both and all(isinstance(files, BadRow) for span in spans for _, _, files in islice(named(span, found), LOOK_AT)):
        refuse_single(where, use, REMEDY)
    return found


def rows(span: Span, layout: Layout) -> Iterator[Row | Skipped]:
    """The rows of one part."""
    for key, record, images in named(span, layout):
        try:
            if isinstance(images, BadRow):
                raise images
            yield Row(key, checked_caption(record.get(layout.caption)), *images)
        except BadRow as bad:
            yield Skipped(key, str(bad))
