"""A folder of images with metadata.jsonl or metadata.csv files (the `datasets` imagefolder convention)."""

from collections.abc import Iterator
from pathlib import Path

from seppo_fast import config
from seppo_fast.data.columns import CAPTIONS, pick, refuse_pairs
from seppo_fast.data.metadata import Layout, Span, csv_header, identity, metadata_files, named, scan_all
from seppo_fast.data.rows import BadRow, Part, Row, Skipped, Source, checked_caption, inside
from seppo_fast.errors import UserError


def open_imagefolder(folder: Path, data: config.Data, needs_loser: bool, only: Path | None = None) -> Source:
    """Images named in the folder's and its sub-folders' metadata files (or in `only` one), in parts of 256 rows."""
    refuse_pairs(f"the image folder {folder}", needs_loser, data.choose)
    files = [only] if only else metadata_files(folder, data.split)
    headers: dict[Path, list[str]] = {file: csv_header(file) for file in files if file.suffix == ".csv"}
    spans, columns = scan_all(files, headers)
    where = str(files[0]) if len(files) == 1 else f"the metadata under {folder}"
    if not spans:
        raise UserError(f"{where} has no rows; it wants one per image: a file_name and a text")
    image = pick(data.image_column, ("file_name", "image"), columns, "image", where)
    layout = Layout(folder, pick(data.caption_column, CAPTIONS, columns, "caption", where), headers,
                    lambda file, record: inside(file.parent, record.get(image)))
    parts = [Part(f"{span.file.relative_to(folder)}:{span.line}", span.count, lambda span=span: rows(span, layout))
             for span in spans]
    return Source(str(folder), "imagefolder", {"image": image, "caption": layout.caption}, parts,
                  lambda: identity(spans, layout))


def rows(span: Span, layout: Layout) -> Iterator[Row | Skipped]:
    """The rows of one part."""
    for key, record, image in named(span, layout):
        try:
            if isinstance(image, BadRow):
                raise image
            yield Row(key, checked_caption(record.get(layout.caption)), image)
        except BadRow as bad:
            yield Skipped(key, str(bad))
