"""Tables with images in them: Pick-a-Pic and other parquet files, `datasets` directories, hub datasets."""

import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import ConcatenationTable

from seppo_fast import config
from seppo_fast.data.columns import CAPTIONS, IMAGES, PAIR, Columns, pick, refuse_pairs
from seppo_fast.data.files import check_readable, files_under
from seppo_fast.data.mapped import check_whole
from seppo_fast.data.metadata import digest_of, stamp_of, written_at
from seppo_fast.data.rows import Identity, Part, Row, Skipped, Source
from seppo_fast.data.splits import ALL, TRAIN, check_file, files_of_split
from seppo_fast.errors import UserError
from seppo_fast.strict import check_columns

ROWS_PER_PART = 256
ROWS_AT_ONCE = 16  # encoded images held in memory while reading
BUFFER = 1 << 20


def open_parquet(path: Path, data: config.Data, needs_loser: bool, seed: int) -> Source:
    """A parquet file, or a folder of them; a part is a row group."""
    if path.is_file():
        check_file(path, data.split)
    files = [path] if path.is_file() else parquet_files(path, data.split)
    footers = {file: footer(file) for file in files}
    names = list(footers[files[0]].schema.to_arrow_schema().names)
    columns = choose_columns(str(files[0]), names, (), data, needs_loser, seed, path if path.is_dir() else path.parent)
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
        return pq.read_metadata(file.absolute())  # Arrow would take `a:b/c` for a URI
    except (pa.ArrowException, OSError) as error:
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
                for record in batch.to_pylist():
                    yield columns.row(f"{name}:{row}", record)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read from row {row} on ({error}); is its download complete?") from error


def stamps(files: Sequence[Path], root: Path, parts: Iterable[Sequence[Path]]) -> Identity:
    """Of these files, of which each part has some."""
    seen = [[os.path.relpath(file, root) if root.is_dir() else file.name, stamp_of(file)] for file in files]
    return Identity(digest_of(seen), tuple(digest_of([written_at(file) for file in part]) for part in parts))


def open_dataset_folder(folder: Path, data: config.Data, needs_loser: bool, seed: int) -> Source:
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
    return dataset_source(str(folder), loaded, [folder / name for name in names], data, needs_loser, seed, folder)


def from_disk(folder: Path) -> tuple[datasets.Dataset | datasets.DatasetDict, str]:
    """What `datasets` finds in the folder, memory-mapped, and the path by which it did: the folder's own may look like a URL."""
    with tempfile.TemporaryDirectory(prefix="seppo_fast_") as place:
        link = os.path.join(place, "data")
        os.symlink(folder.absolute(), link)
        return datasets.load_from_disk(link), link


def open_hub_dataset(name: str, data: config.Data, needs_loser: bool, seed: int) -> Source:
    """A dataset of the hub, downloaded by `datasets` into its own cache."""
    try:
        loaded = datasets.load_dataset(name, split=data.split)
    except Exception as error:  # offline, unknown name, unknown split, gated, half downloaded
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"seppo.data.source={name!r}: there is no such file or folder here, and as a hub dataset (split"
                        f" {data.split!r}) it cannot be loaded: {reason}") from error
    return dataset_source(name, loaded, [], data, needs_loser, seed, None)


def dataset_source(name: str, dataset: datasets.Dataset, files: Sequence[Path], data: config.Data, needs_loser: bool,
                   seed: int, folder: Path | None) -> Source:
    """An opened (memory-mapped) dataset in parts of 256 rows."""
    if not len(dataset):
        raise UserError(f"{name} has no rows")
    kinds = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    columns = choose_columns(name, dataset.column_names, kinds, data, needs_loser, seed, folder)
    dataset = dataset.with_format(None).select_columns(columns.needed())
    for column in kinds:
        if column in dataset.column_names:
            # We decode: a bad image is one row, not an exception for the whole batch.
            dataset = dataset.cast_column(column, datasets.Image(decode=False))

    opened = [(file, file.stat().st_size) for file in files or (Path(entry["filename"]) for entry in dataset.cache_files)]
    ends = file_ends(dataset)

    def rows(first: int, end: int) -> Iterator[Row | Skipped]:
        for row in range(first, end):
            place = bisect_right(ends, row)
            check_whole(opened[place:place + 1], "restore it and start again, what is cached stays valid")
            yield columns.row(f"{Path(name).name}:{row}", dataset[row])

    spans = [(first, min(first + ROWS_PER_PART, len(dataset))) for first in range(0, len(dataset), ROWS_PER_PART)]
    parts = [Part(f"{Path(name).name}:{first}", end - first, lambda a=first, b=end: rows(a, b)) for first, end in spans]
    # Which rows are in which file is not looked for: of a hub dataset there are none, another's are written together.
    stamp, written = stamps(files, folder, [files] * len(parts)) if folder else ("", ("",) * len(parts))
    identity = Identity(f"{dataset._fingerprint}:{len(dataset)}:{stamp}", written)
    return Source(name, "datasets", columns.named(), parts, lambda: identity)


def file_ends(dataset: datasets.Dataset) -> list[int]:
    """After which row each of its files ends."""
    tables = [blocks[0] for blocks in dataset.data.blocks] if isinstance(dataset.data, ConcatenationTable) else [dataset.data]
    return list(accumulate(map(len, tables)))


def choose_columns(where: str, names: list[str], images: Any, data: config.Data, needs_loser: bool, seed: int,
                   folder: Path | None) -> Columns:
    """Pairs when Pick-a-Pic's columns are there and no image column was asked for, else single images."""
    caption = pick(data.caption_column, CAPTIONS, names, "caption", where)
    if data.image_column is None and all(name in names for name in PAIR):
        if needs_loser and data.choose == "random":
            raise UserError("seppo.data.choose='random' does not go with method 'dpo', whose winner is the preferred"
                            " image; set seppo.data.choose to 'winner'")
        return Columns(None, caption, needs_loser, data.choose, seed, folder, "has_label" in names,
                       data.allow_outside)
    image = pick(data.image_column, (*images, *IMAGES), names, "image", where)
    refuse_pairs(f"{where} (column {image!r})", needs_loser, data.choose)
    return Columns(image, caption, folder=folder, outside=data.allow_outside)
