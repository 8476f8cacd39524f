"""The finished cache, memory-mapped: latents by row, prompt embeddings by prompt."""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from seppo_fast.data.mapped import Mapped
from seppo_fast.data.prompt_encoder import PromptEncoder
from seppo_fast.data.shards import as_numpy
from seppo_fast.data.stamps import read_stamp
from seppo_fast.errors import UserError
from seppo_fast.models import Conditions

PROMPTS_PER_SHARD = 256


@dataclass(frozen=True)
class CachedRows:
    """B rows: posterior mean and standard deviation, unscaled, (B, C, h, w), of clips (B, C, F, h, w), fp32 on the CPU."""

    mean: Tensor
    std: Tensor
    loser_mean: Tensor | None
    loser_std: Tensor | None
    prompts: list[int]
    captions: list[str]
    keys: list[str]


@dataclass(frozen=True)
class Images:
    """The image shards as one dataset, what was declared about each, and the distinct prompts."""

    dataset: Mapped
    stamps: list[dict[str, Any]]
    prompts: "Prompts"


@dataclass(frozen=True)
class Prompts:
    """The distinct captions, "" first, then in the order of their first row; `of_row` (rows,) int32: each row's caption."""

    texts: pa.Array
    of_row: np.ndarray

    def captions(self, rows: Sequence[int]) -> list[str]:
        """The captions of some rows."""
        return self.texts.take(pa.array(self.of_row[list(rows)])).to_pylist()


class PromptCache:
    """The embeddings of the distinct prompts, memory-mapped. `PromptEncoder` makes the same when they are asked for."""

    window = sys.maxsize  # prompts that are at hand at once

    def __init__(self, folder: Path, prompts: Prompts, patience: float = 0):
        arrows = [prompt_shard(folder, number) for number in range(prompt_shards(prompts))]
        self.stamps = stamps_of(arrows, patience)
        self.shapes: dict[str, list[int]] = self.stamps[0]["shapes"]
        self.texts = Mapped(arrows)

    def __call__(self, prompts: Sequence[int]) -> Conditions:
        """The conditions of some prompts, fp32, (B, ...) each."""
        table = self.texts[[int(prompt) for prompt in prompts]]
        return {name: tensor_of(table, name, tuple(shape)) for name, shape in self.shapes.items()}

    def hold(self, prompts: Iterable[int]) -> None:
        """Nothing to do: all prompts are there."""


class LatentCache:
    """The cached rows, in the order of the source's parts. Nothing is read before it is asked for."""

    def __init__(self, folder: Path, images: Images | None = None, patience: float = 0, content: str | None = None,
                 texts: PromptCache | PromptEncoder | None = None):
        self.folder = folder
        self.fingerprint = folder.name
        about = json.loads((folder / "fingerprint.json").read_bytes())
        self.shape: tuple[int, ...] = tuple(about["shape"])
        images = images or open_images(folder, about["demonstrations"]["parts"], patience)
        self.images, self.prompts = images.dataset, images.prompts
        self.skipped = [tuple(pair) for stamp in images.stamps for pair in stamp["skipped"]]
        self.ties = sum(stamp["ties"] for stamp in images.stamps)
        self.texts = texts or PromptCache(folder, self.prompts, patience)
        self.content = content

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, indices: Sequence[int], epochs: Sequence[int] = ()) -> CachedRows:
        """Rows in the order asked for; they may repeat, and are the same in all epochs."""
        indices = [int(index) for index in indices]
        table = self.images[indices]
        tensors = {name: tensor_of(table, name, self.shape) for name in ("mean", "std", "loser_mean", "loser_std")}
        return CachedRows(**tensors, prompts=self.prompts.of_row[indices].tolist(),
                          captions=table.column("caption").to_pylist(), keys=table.column("key").to_pylist())

    def embeddings(self, prompts: Sequence[int]) -> Conditions:
        """The conditions of some prompts, fp32, (B, ...) each; prompt 0 is "", the unconditional one."""
        return self.texts(prompts)

    def prefetch(self, indices: Sequence[int], epochs: Sequence[int]) -> None:
        """Nothing to do: all rows are there. `ClipStream` decodes ahead."""

    def close(self) -> None:
        """Nothing to do: there are no threads."""


def tensor_of(table: pa.Table, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """A column as (rows, *shape) fp32; None where the table has no such column."""
    return torch.from_numpy(as_numpy(table.column(name), shape)) if name in table.column_names else None


def row_shard(folder: Path, part: int, holds: str = "latents") -> Path:
    """The shard of a part's rows: their latents, or, for a stream, what is known of their "clips"."""
    return folder / holds / f"{part:05d}.arrow"


def prompt_shard(folder: Path, number: int) -> Path:
    return folder / "prompts" / f"{number:05d}.arrow"


def prompt_shards(prompts: Prompts) -> int:
    return -(-len(prompts.texts) // PROMPTS_PER_SHARD)


def open_images(folder: Path, parts: int, patience: float = 0, holds: str = "latents") -> Images:
    """The row shards of a cache whose parts are all finished."""
    arrows = [row_shard(folder, part, holds) for part in range(parts)]
    stamps = stamps_of(arrows, patience)
    filled = [arrow for arrow, stamp in zip(arrows, stamps, strict=True) if stamp["rows"]]
    dataset = Mapped(filled or arrows[:1])
    return Images(dataset, stamps, distinct_prompts(dataset))


def stamps_of(arrows: list[Path], patience: float) -> list[dict[str, Any]]:
    """The stamp of each shard; waits up to `patience` seconds until what other machines wrote becomes visible."""
    give_up = time.monotonic() + patience
    stamps: list[dict[str, Any]] = []
    for arrow in arrows:
        while (stamp := read_stamp(arrow)) is None:
            if time.monotonic() >= give_up:
                raise UserError(f"the cache is not finished: {arrow} is missing or cut off. Run the training again, it"
                                " makes what is missing; with several machines, seppo.data.cache_dir must be a folder"
                                " that all of them see")
            time.sleep(0.2)
        stamps.append(stamp)
    return stamps


def distinct_prompts(images: Mapped) -> Prompts:
    """Numbers the captions. Reads the caption column alone; memory grows by the distinct texts and 4 bytes a row."""
    captions = images.column("caption")
    encoded = pa.chunked_array([pa.array([""], pa.string()), *captions.chunks]).dictionary_encode()
    numbers = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    return Prompts(encoded.chunk(0).dictionary, numbers[1:].astype(np.int32))
