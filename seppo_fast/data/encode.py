"""Turns a part of the source into rows of latents: images are decoded in threads, ahead of the VAE; clips come decoded."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor

from seppo_fast import config
from seppo_fast.data.content import Content, read_all, sha256_of
from seppo_fast.data.images import load_rgb, prepare_alike
from seppo_fast.data.pairs import each
from seppo_fast.data.rows import BadRow, Part, Row, Skipped
from seppo_fast.seeds import generator

Pixels = tuple[Row, Tensor, Tensor | None]


def pixels_of(row: Row | Skipped, data: config.Data, seed: int, content: Content) -> Pixels | Skipped:
    """Winner (and loser) as (3, R, R) in [-1, 1]; their crop and flip are one, by (seed, key) alone. `content` gets the digests."""
    if isinstance(row, Skipped):
        content.add(row)
        return row
    random = generator(seed, "prepare", row.key)
    files = read_all(row)
    content.add(row, [sha256_of(file) for file in files])
    try:
        pixels = prepare_alike(each(files, load_rgb), data.resolution, data.crop, data.flip, random)
    except BadRow as bad:
        return Skipped(row.key, str(bad))
    if len(pixels) == 1:
        return row, pixels[0], None
    winner, loser = pixels
    return Skipped(row.key, "winner and loser are the same picture") if torch.equal(winner, loser) else (row, winner, loser)


def decoded(part: Part, data: config.Data, seed: int, threads: Executor, content: Content | None = None,
            ) -> Iterator[Pixels | Skipped]:
    """The part's rows in order, decoded up to two VAE batches ahead; no more than that is ever in memory."""
    ahead = deque()
    content = content or Content()
    for row in part.rows():
        ahead.append(threads.submit(pixels_of, row, data, seed, content))
        if len(ahead) >= 2 * data.encode_batch_size + data.workers:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def encoded(rows: Iterable[Pixels | Skipped], model: Any, vae: Any, data: config.Data, device: str | torch.device,
            ) -> Iterator[tuple[dict[str, Any], list[Skipped], int]]:
    """(columns, unusable rows, rows read) of each VAE batch, or clip. Batches never span parts, so ranks change nothing."""
    batch: list[Pixels] = []
    skipped: list[Skipped] = []
    for row in rows:
        if isinstance(row, Skipped):
            skipped.append(row)
        else:
            batch.append(row)
        if len(batch) >= (1 if model.video else data.encode_batch_size) or len(skipped) >= 64:
            yield encode_batch(batch, skipped, model, vae, data, device)
            batch, skipped = [], []
    if batch or skipped:
        yield encode_batch(batch, skipped, model, vae, data, device)


def encode_batch(batch: list[Pixels], skipped: list[Skipped], model: Any, vae: Any, data: config.Data,
                 device: str | torch.device) -> tuple[dict[str, Any], list[Skipped], int]:
    """Posterior mean and standard deviation of winners and losers; rows that come out non-finite are skipped."""
    read = len(batch) + len(skipped)
    if not batch:
        return {}, skipped, read
    dtype = getattr(torch, data.cache_dtype)
    columns: dict[str, Any] = {}
    for prefix, place in (("", 1), ("loser_", 2)):
        if batch[0][place] is not None:
            pixels = torch.stack([row[place] for row in batch]).to(device)
            mean, std = model.encode(vae, pixels, data.encode_batch_size)
            columns[f"{prefix}mean"] = mean.cpu().to(dtype)
            columns[f"{prefix}std"] = std.cpu().to(dtype)
    finite = torch.stack([values.isfinite().flatten(1).all(1) for values in columns.values()]).all(0)
    rows = [row for row, _, _ in batch]
    skipped = skipped + [Skipped(row.key, f"its latents are not finite in {data.cache_dtype}")
                         for row, good in zip(rows, finite.tolist(), strict=True) if not good]
    rows = [row for row, good in zip(rows, finite.tolist(), strict=True) if good]
    columns = {name: values[finite] for name, values in columns.items()}
    return columns | {"caption": [row.prompt for row in rows], "key": [row.key for row in rows]}, skipped, read
