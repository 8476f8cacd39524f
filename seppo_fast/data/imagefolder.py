"""A folder of images with metadata.jsonl or metadata.csv files (the `datasets` imagefolder convention)."""

from collections.abc import Iterator
from pathlib import Path

from seppo_fast import config
from seppo_fast.data.columns import CAPTIONS, pick, refuse_pairs
from seppo_fast.data.metadata import Layout, Span, identity, metadata_files, named, scan_all
from seppo_fast.data.rows import BadRow, Part, Row, Skipped, Source, checked_caption, embedded, inside
from seppo_fast.errors import UserError

FILES = ("file_name", "image")  # columns that name a file


def open_imagefolder(folder: Path, data: config.Data, needs_loser: bool, only: Path | None = None) -> Source:
    """Images named in the folder's and its sub-folders' metadata files (or in `only` one), in parts of 256 rows."""
    refuse_pairs(f"the image folder {folder}", needs_loser, data.choose)
    files = [only] if only else metadata_files(folder)
    where = str(files[0]) if len(files) == 1 else f"the metadata under {folder}"
    names = (data.image_column,) if data.image_column else FILES
    found = scan_all(files, folder, names, data.split, where)
    if not found.spans:
        raise UserError(f"{where} has no rows; it wants one per image: a file_name and a text")
    image = pick(data.image_column, FILES, found.columns, "image", where)
    layout = Layout(folder, pick(data.caption_column, CAPTIONS, found.columns, "caption", where), found.headers,
                    lambda file, record: embedded(record.get(image)) or inside(file.parent, record.get(image),
                                                                                   outside=data.allow_outside),
                    names, data.split, found.splits)
    parts = [Part(f"{span.file.relative_to(folder)}:{span.line}", count, lambda span=span: rows(span, layout))
             for span, count in found.spans]
    return Source(str(folder), "imagefolder", {"image": image, "caption": layout.caption}, parts,
                  lambda: identity([span for span, _ in found.spans], layout))


def rows(span: Span, layout: Layout) -> Iterator[Row | Skipped]:
    """The rows of one part."""
    for key, record, image in named(span, layout):
        try:
            if isinstance(image, BadRow):
                raise image
            yield Row(key, checked_caption(record.get(layout.caption)), image)
        except BadRow as bad:
            yield Skipped(key, str(bad))
