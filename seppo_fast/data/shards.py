"""A part of the cache is an Arrow file, and a JSON that says that it is finished. Both appear whole (by rename) or not at all."""

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from seppo_fast.checksums import Hashing
from seppo_fast.disk import NO_ROOM
from seppo_fast.errors import UserError

STALE_SECONDS = 24 * 3600


@contextmanager
def clear_errors(folder: Path) -> Iterator[None]:
    """Turns the errors of a full disk or a read-only folder into a `UserError` that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise UserError(f"no room left while writing to {folder} ({error.strerror}). Free some, or choose a"
                            " larger disk (seppo.data.cache_dir, seppo.output_dir); what is finished stays"
                            " valid") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write to {folder} ({error.strerror}); choose a folder of yours"
                            " (seppo.data.cache_dir, seppo.output_dir)") from error
        if error.errno in (errno.ENOENT, errno.ESTALE) and not folder.exists():
            raise UserError(f"{folder} was removed while this run wrote to it; start again, what is missing is made") from error
        raise


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A temporary file that becomes `target` when the block ends without an error. Its name is unique to this job."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with clear_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = open(temporary, "wb")
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            os.replace(temporary, target)
        finally:
            # After a failed write, closing flushes and fails again: the first error is the one to report.
            try:
                stream.close()
            except OSError:
                pass
            temporary.unlink(missing_ok=True)


def write_json(target: Path, value: Any) -> None:
    """JSON with a fixed layout, so that two writers make the same bytes."""
    with replacing(target) as stream:
        stream.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def remove_stale(folder: Path) -> None:
    """Deletes temporary files of killed runs: those that nobody wrote to for a day, by the file system's own clock."""
    found = [*folder.glob("*/.*.tmp")]
    if not found:
        return
    probe = folder / f".{uuid.uuid4().hex}.clock"
    with suppress(OSError):  # the cache is read-only
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        for left in found:
            with suppress(OSError):  # another job was faster
                if now - left.stat().st_mtime > STALE_SECONDS:
                    left.unlink()


class Shard:
    """Columns of fixed-length number lists and of strings, written in record batches of `rows_at_once`."""

    def __init__(self, stream: BinaryIO | Hashing, lists: dict[str, int], strings: list[str], dtype: str, rows_at_once: int = 64):
        self.features = Features({name: List(Value(dtype), length=length) for name, length in lists.items()}
                                 | {name: Value("string") for name in strings})
        self.writer = ArrowWriter(features=self.features, stream=stream)
        self.lists = lists
        # Every record batch costs a few kB of memory wherever the cache is opened: make them larger than the VAE's.
        self.rows_at_once = rows_at_once
        self.pending: list[pa.Table] = []
        self.rows = 0

    def add(self, columns: dict[str, Tensor | list[str]]) -> None:
        """Some rows: tensors (rows, ...) in the shard's dtype, and lists of strings."""
        arrays = [as_array(columns[name], self.lists.get(name)) for name in self.features]
        table = pa.Table.from_arrays(arrays, schema=self.features.arrow_schema)
        self.pending.append(table)
        self.rows += len(table)
        if sum(map(len, self.pending)) >= self.rows_at_once:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            self.writer.write_table(pa.concat_tables(self.pending).combine_chunks())
            self.pending = []

    def finish(self) -> None:
        self.flush()
        self.writer.finalize(close_stream=False)


def as_array(values: Tensor | list[str], length: int | None) -> pa.Array:
    """An Arrow array of a tensor (rows, ...) with `length` numbers a row, or of strings."""
    if length is None:
        return pa.array(values, pa.string())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.contiguous().numpy().reshape(-1)), length)


def as_numpy(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `as_array`: (rows, *shape) fp32."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32).reshape(-1, *shape)
