"""Tables that hold images: Pick-a-Pic and other parquet files, `datasets` directories, hub datasets."""

import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import ConcatenationTable

from seppo_fast import config
from seppo_fast.data.columns import CAPTIONS, IMAGES, PAIR, Columns, image_columns, kind_of, pick
from seppo_fast.data.files import check_readable, files_under
from seppo_fast.data.mapped import check_whole
from seppo_fast.data.metadata import digest_of, stamp_of, written_at
from seppo_fast.data.pairs import Use, refuse_single
from seppo_fast.data.rows import Identity, Part, Row, Skipped, Source
from seppo_fast.data.splits import ALL, TRAIN, check_file, files_of_split
from seppo_fast.errors import UserError
from seppo_fast.strict import check_columns

ROWS_PER_PART = 256
ROWS_AT_ONCE = 16  # encoded images held in memory while reading
BUFFER = 1 << 20
ADVICE = "restore it and start again, what is cached stays valid"


def open_parquet(path: Path, data: config.Data, use: Use) -> Source:
    """A parquet file, or a folder of them; a part is a row group."""
    if path.is_file():
        check_file(path, data.split)
    files = [path] if path.is_file() else parquet_files(path, data.split)
    footers = {file: footer(file) for file in files}
    schema = footers[files[0]].schema.to_arrow_schema()
    columns = choose_columns(str(files[0]), schema, (), data, use, path if path.is_dir() else path.parent)
    for file, meta in footers.items():
        check_columns(meta.schema.to_arrow_schema().names, str(file))
        missing = [name for name in columns.needed() if name not in meta.schema.to_arrow_schema().names]
        if missing:
            raise UserError(f"{file} has no column {', '.join(missing)}, which {files[0]} has; all files must have the"
                            " same columns")
    parts, places = [], []
    for file, meta in footers.items():
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        first = 0
        for group in range(meta.num_row_groups):
            count = meta.row_group(group).num_rows
            if count:
                places.append([file])
                parts.append(Part(f"{name}:{first}", count,
                                  lambda f=file, n=name, g=group, r=first: parquet_rows(f, n, g, r, columns)))
            first += count
    if not parts:
        raise UserError(f"{path} has no rows")
    return Source(str(path), "parquet", columns.named(), parts, lambda: stamps(files, path, places))


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of the split under a folder, sorted."""
    files = files_under(folder, ".parquet")
    if not files:
        raise UserError(f"{folder} has no .parquet files")
    return files_of_split(files, folder, split)


def footer(file: Path) -> pq.FileMetaData:
    """A parquet file's metadata; `UserError` when the file is not whole."""
    check_readable(file)
    try:
        found = pq.read_metadata(file.absolute())  # Arrow would take `a:b/c` for a URI
        found.schema.to_arrow_schema()
        return found
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a readable parquet file ({error}); is its download complete?") from error


def parquet_rows(file: Path, name: str, group: int, first: int, columns: Columns) -> Iterator[Row | Skipped]:
    """The rows of one row group, read a few at a time; the key is the file and the row in it (from 0)."""
    row = first
    check_readable(file)
    try:
        # Without buffer_size and pre_buffer, Arrow reads a row group's whole column: gigabytes of images.
        with pq.ParquetFile(file.absolute(), buffer_size=BUFFER, pre_buffer=False) as parquet:
            wanted = columns.needed()
            for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=wanted, use_threads=False):
                for record in in_bytes(batch, columns.caption).to_pylist():
                    yield columns.row(f"{name}:{row}", record)
                    row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read from row {row} on ({error}); is its download complete?") from error


def in_bytes(batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
    """The rows with their column of texts as bytes, so that a text that is no UTF-8 is one bad row, not an error for all."""
    column = batch.column(name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return batch
    return batch.set_column(batch.schema.get_field_index(name), name, column.cast(pa.large_binary()))


def stamps(files: Sequence[Path], root: Path, parts: Iterable[Sequence[Path]]) -> Identity:
    """The identity of these files; `parts` are the files of each part."""
    seen = [[os.path.relpath(file, root) if root.is_dir() else file.name, stamp_of(file)] for file in files]
    return Identity(digest_of(seen), tuple(digest_of([written_at(file) for file in part]) for part in parts))


def open_dataset_folder(folder: Path, data: config.Data, use: Use) -> Source:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    files_under(folder, (".arrow", ".json"))
    try:
        loaded, place = from_disk(folder)
    except Exception as error:  # pyarrow, JSON, missing files: whatever is wrong, the folder is not whole
        raise UserError(f"{folder} looks like a datasets directory but cannot be opened ({error}); is it"
                        " complete?") from error
    if isinstance(loaded, datasets.DatasetDict):
        if data.split not in (*loaded, ALL):
            raise UserError(f"seppo.data.split={data.split!r}: {folder} has the splits: {', '.join(loaded)}")
        loaded = loaded[data.split] if data.split in loaded else datasets.concatenate_datasets(list(loaded.values()))
    elif data.split not in (TRAIN, ALL, str(loaded.split)):
        raise UserError(f"seppo.data.split={data.split!r}: {folder} is one dataset without splits, which counts as 'train'")
    names = [os.path.relpath(entry["filename"], place) for entry in loaded.cache_files]
    if any(name.split(os.sep)[0] == ".." for name in names):
        raise UserError(f"{folder} is of tables outside it, by the names in its state.json; put them there")
    return dataset_source(str(folder), loaded, [folder / name for name in names], data, use, folder)


def from_disk(folder: Path) -> tuple[datasets.Dataset | datasets.DatasetDict, str]:
    """The memory-mapped dataset in a folder, and the link by which it was opened: the folder's own path may look like a URL."""
    with tempfile.TemporaryDirectory(prefix="seppo_fast_") as place:
        link = os.path.join(place, "data")
        os.symlink(folder.absolute(), link)
        return datasets.load_from_disk(link), link


def open_hub_dataset(name: str, data: config.Data, use: Use) -> Source:
    """A dataset of the hub, downloaded by `datasets` into its own cache."""
    try:
        loaded = datasets.load_dataset(name, split=data.split)
    except Exception as error:  # offline, unknown name, unknown split, gated, half downloaded
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"seppo.data.source={name!r}: there is no such file or folder here, and as a hub dataset (split"
                        f" {data.split!r}) it cannot be loaded: {reason}") from error
    return dataset_source(name, loaded, [], data, use, None)


def dataset_source(name: str, dataset: datasets.Dataset, files: Sequence[Path], data: config.Data, use: Use,
                   folder: Path | None) -> Source:
    """An opened (memory-mapped) dataset in parts of 256 rows."""
    if not len(dataset):
        raise UserError(f"{name} has no rows")
    kinds = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    columns = choose_columns(name, dataset.features.arrow_schema, kinds, data, use, folder)
    dataset = dataset.with_format(None).select_columns(columns.needed())
    for column in kinds:
        if column in dataset.column_names:
            # We decode: a bad image is one row, not an exception for the whole batch.
            dataset = dataset.cast_column(column, datasets.Image(decode=False))

    opened = [(file, file.stat().st_size) for file in files or (Path(entry["filename"]) for entry in dataset.cache_files)]
    ends, table = file_ends(dataset), dataset.data.table

    def rows(first: int, end: int) -> Iterator[Row | Skipped]:
        check_whole(opened[bisect_right(ends, first):bisect_right(ends, end - 1) + 1], ADVICE)
        try:  # Arrow trusts what it maps, and would read wherever a damaged offset points
            table.slice(first, end - first).select(columns.needed()).validate(full=True)
        except pa.ArrowException as error:
            raise UserError(f"{name} is damaged in its rows {first} to {end - 1} ({error}); is its download complete?") from error
        for row in range(first, end):
            place = bisect_right(ends, row)
            check_whole(opened[place:place + 1], ADVICE)
            yield columns.row(f"{Path(name).name}:{row}", dataset[row])

    spans = [(first, min(first + ROWS_PER_PART, len(dataset))) for first in range(0, len(dataset), ROWS_PER_PART)]
    parts = [Part(f"{Path(name).name}:{first}", end - first, lambda a=first, b=end: rows(a, b)) for first, end in spans]
    # Which rows are in which file is not looked for: of a hub dataset there are none, another's are written together.
    stamp, written = stamps(files, folder, [files] * len(parts)) if folder else ("", ("",) * len(parts))
    identity = Identity(f"{dataset._fingerprint}:{len(dataset)}:{stamp}", written)
    return Source(name, "datasets", columns.named(), parts, lambda: identity)


def file_ends(dataset: datasets.Dataset) -> list[int]:
    """The number of rows up to the end of each of the dataset's files."""
    tables = [blocks[0] for blocks in dataset.data.blocks] if isinstance(dataset.data, ConcatenationTable) else [dataset.data]
    return list(accumulate(map(len, tables)))


def choose_columns(where: str, schema: pa.Schema, images: Sequence[str], data: config.Data, use: Use, folder: Path | None
                   ) -> Columns:
    """Pairs when Pick-a-Pic's columns are there and no others were asked for, else a column of images, and of losers if need be.

    `images`: the columns that are declared to hold images.
    """
    names, labelled = schema.names, all(name in schema.names for name in PAIR)
    caption = pick(data.caption_column, CAPTIONS, names, "caption", where)
    if labelled and data.loser_column in PAIR:
        raise UserError(f"seppo.data.loser_column={data.loser_column!r}: in {where} label_0 says of each row which of jpg_0 and"
                        " jpg_1 is the loser; leave seppo.data.image_column and seppo.data.loser_column out")
    if labelled and data.image_column is None and data.loser_column is None:
        return Columns(None, caption, None, use, folder, "has_label" in names, data.allow_outside)
    known = [*(name for name in IMAGES if name in images), *(name for name in images if name not in IMAGES)] or IMAGES
    image, loser = image_columns(data, {field.name: kind_of(field.type) for field in schema}, known, use, where)
    if loser is None:
        refuse_single(f"{where} (column {image!r})", use, "name the column of the losers with seppo.data.loser_column, or call the"
                      f" columns 'chosen' and 'rejected', or as in Pick-a-Pic ({', '.join(PAIR)})")
    return Columns(image, caption, loser if use.both else None, use, folder, outside=data.allow_outside)
