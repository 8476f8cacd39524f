"""DeepSpeed's files of a checkpoint: written with checksums, and read as tensors, numbers and text, so that no code in them runs.

DeepSpeed itself unpickles every file that matches a pattern made of the folder's name; here only files of this checkpoint are read.
"""

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from seppo_fast.checksums import Hashing
from seppo_fast.errors import UserError, reason
from seppo_fast.failure import lost_contact
from seppo_fast.models.quantize import without_quantized
from seppo_fast.training.marker import Written, listed

TAG = "deepspeed"
# What DeepSpeed's states hold beside tensors, numbers, text and their containers: classes that only keep numbers.
KEPT = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)


def save(engine: DeepSpeedEngine, folder: Path) -> dict[str, Written]:
    """Have DeepSpeed write into `folder`; returns what this rank wrote, by name. Every rank must call."""
    with _files(engine, folder) as files, without_quantized(engine.module):
        engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    return files.written


def load(engine: DeepSpeedEngine, folder: Path) -> None:
    """Have DeepSpeed read what `save` wrote; `UserError` where it cannot, or where a file was added or replaced."""
    known = listed(folder)
    for file in (folder / TAG).glob("*.pt"):  # DeepSpeed takes all that match, and merges them
        if file.relative_to(folder).as_posix() not in known:
            raise UserError(f"{file} was put there after the checkpoint was written: remove it")
    try:
        with _files(engine, folder), _plain_name(folder) as path, without_quantized(engine.module):
            loaded, _ = engine.load_checkpoint(path, tag=TAG, load_module_strict=False)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, AssertionError, IndexError) as error:
        if lost_contact(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"{folder}: DeepSpeed cannot load it ({reason(error)}); {INSTEAD}") from error
    if loaded is None:
        raise UserError(f"{folder}: DeepSpeed found nothing to load in it; {INSTEAD}")


INSTEAD = "go on from an earlier checkpoint with --resume PATH"


class _Files(CheckpointEngine):
    """DeepSpeed saves and loads files through this; `written` has each file's size and checksum."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.written = folder.resolve(), dict[str, Written]()

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Files are complete when they are saved."""
        return True

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, and make sure that `load` will read it."""
        with open(path, "wb") as file:
            hashing = Hashing(file)
            torch.save(state_dict, cast(BinaryIO, hashing))  # it calls `write` and `flush` alone
        self.written[self._name(path)] = Written(size=hashing.size, xxh3_128=hashing.hexdigest())
        with torch.serialization.safe_globals([*KEPT]):
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if unknown:
            raise UserError(f"a checkpoint holds tensors, numbers and text, but DeepSpeed's state holds"
                            f" {', '.join(sorted(unknown))}, which would not be read again: choose another optimizer or scheduler")

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file of this checkpoint; code that a pickle holds is not run."""
        name = self._name(path)
        try:
            with torch.serialization.safe_globals([*KEPT]):
                return torch.load(path, map_location=map_location, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # the unpickler's own, EOFError, RuntimeError, KeyError, ...: damage has many faces
            raise UserError(f"{self.folder / name} is damaged, or holds more than tensors, numbers and text: code that it may hold"
                            f" was not run; {INSTEAD}") from error

    def _name(self, path: str) -> str:
        real = Path(path).resolve()
        if not real.is_relative_to(self.folder):
            raise UserError(f"{self.folder} leads to {real}, which is no part of it; {INSTEAD}")
        return real.relative_to(self.folder).as_posix()


@contextmanager
def _files(engine: DeepSpeedEngine, folder: Path) -> Iterator[_Files]:
    before, engine.checkpoint_engine = engine.checkpoint_engine, _Files(folder)
    try:
        yield engine.checkpoint_engine
    finally:
        engine.checkpoint_engine = before


@contextmanager
def _plain_name(folder: Path) -> Iterator[str]:
    """A path to `folder` that is safe where DeepSpeed reads it as a glob pattern."""
    if glob.escape(str(folder)) == str(folder):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory(prefix="seppo-fast-") as beside:
        link = os.path.join(beside, "checkpoint")
        os.symlink(folder.resolve(), link)
        yield link
