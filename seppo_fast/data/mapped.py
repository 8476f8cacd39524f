"""Arrow files, memory-mapped, as one table whose rows are asked for by number."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import MemoryMappedTable, concat_tables

from seppo_fast.errors import UserError


class Mapped:
    """Rows as Arrow tables; `UserError` where a file was cut off or removed since it was opened.

    The operating system ends a process that touches a page which is no longer there (SIGBUS), so the files of the rows that are
    asked for are looked at first: microseconds each.
    """

    def __init__(self, arrows: Sequence[Path]) -> None:
        self.arrows, self.sizes = arrows, [arrow.stat().st_size for arrow in arrows]
        # Not concatenate_datasets(Dataset.from_file(...)): that pickles each one for a fingerprint, 3 ms times thousands.
        tables = [MemoryMappedTable.from_file(str(arrow)) for arrow in arrows]
        self.ends = np.cumsum([len(table) for table in tables])
        self.dataset = Dataset(concat_tables(tables), fingerprint=arrows[0].parent.name).with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: list[int]) -> pa.Table:
        self.check(np.unique(np.searchsorted(self.ends, rows, side="right")).tolist())
        return self.dataset[rows]

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column."""
        self.check(range(len(self.arrows)))
        return self.dataset.data.column(name)

    def check(self, files: Sequence[int]) -> None:
        """`UserError` where one of these files is shorter than it was, or gone."""
        check_whole(((self.arrows[file], self.sizes[file]) for file in files), "leave seppo.data.cache_dir alone meanwhile."
                    " --resume auto makes it anew and goes on from the last checkpoint")


def check_whole(files: Iterable[tuple[Path, int]], advice: str) -> None:
    """`UserError` where one of these memory-mapped files is gone, or shorter than the size beside it."""
    for file, size in files:
        try:
            whole = os.stat(file).st_size >= size
        except OSError:
            whole = False
        if not whole:
            raise UserError(f"{file} was cut off or removed while this run reads it; {advice}")
