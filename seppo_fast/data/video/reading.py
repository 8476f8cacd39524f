"""A part of a video source to usable rows: each file is probed, and decoded where its latents are to be cached."""

import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from seppo_fast import config
from seppo_fast.data.content import Content, sha256_of
from seppo_fast.data.metadata import written_at
from seppo_fast.data.rows import BadRow, Part, Row, Skipped
from seppo_fast.data.video.clips import Clip, clip
from seppo_fast.data.video.decoder import Decoder
from seppo_fast.data.video.probe import probe

ROWS_AT_ONCE = 64


def probed(part: Part, data: config.Data, seed: int, threads: Executor, content: Content) -> Iterator[tuple[Row, Clip] | Skipped]:
    """The part's rows in order, each with its clip of epoch 0, probed a little ahead."""
    ahead = deque()
    for row in part.rows():
        ahead.append(threads.submit(probed_row, row, data, seed, content))
        if len(ahead) > 2 * data.workers:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def probed_row(row: Row | Skipped, data: config.Data, seed: int, content: Content) -> tuple[Row, Clip] | Skipped:
    """A row and its clip, or why it cannot be used. `content` gets the digests."""
    if isinstance(row, Skipped):
        content.add(row)
        return row
    written, digest = written_at(row.image), sha256_of(row.image)
    content.add(row, [digest])
    try:
        facts = replace(probe(row.image), written=written, content=digest)  # the operating system still has what was read just now
        return row, clip(row.key, row.image, facts, row.time_lapse, data, seed, 0)
    except BadRow as bad:
        return Skipped(row.key, str(bad))


def described(part: Part, root: Path, data: config.Data, seed: int, threads: Executor, content: Content,
              ) -> Iterator[tuple[dict[str, Any], list[Skipped], int]]:
    """(columns, unusable rows, rows read) of some rows at a time; the column "clip" is what `ClipStream` reads."""
    every = probed(part, data, seed, threads, content)
    while rows := list(islice(every, ROWS_AT_ONCE)):
        good = [found for found in rows if not isinstance(found, Skipped)]
        columns = {"caption": [row.prompt for row, _ in good], "key": [row.key for row, _ in good],
                   "clip": [as_text(row, found, root) for row, found in good]}
        yield columns if good else {}, [found for found in rows if isinstance(found, Skipped)], len(rows)


def as_text(row: Row, found: Clip, root: Path) -> str:
    """What a shard keeps of a clip; the path is relative, so that the folder may move."""
    return json.dumps({"file": os.path.relpath(row.image, root), "time_lapse": row.time_lapse, "facts": asdict(found.facts)})


def decoded_clips(part: Part, data: config.Data, seed: int, threads: Executor, content: Content, decoder: Decoder,
                  ) -> Iterator[tuple[Row, Tensor, None] | Skipped]:
    """The part's rows in order with their frames (F, 3, R, R); `data.workers` clips are decoded while as many are encoded."""
    every = probed(part, data, seed, threads, content)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(decoded_group, every, data.workers, decoder)
        while group := coming.result():
            coming = thread.submit(decoded_group, every, data.workers, decoder)
            yield from group


def decoded_group(every: Iterator[tuple[Row, Clip] | Skipped], size: int, decoder: Decoder,
                  ) -> list[tuple[Row, Tensor, None] | Skipped]:
    """The next rows, decoded together."""
    group = list(islice(every, size))
    pixels = iter(decoder([found[1] for found in group if not isinstance(found, Skipped)]))
    done: list[tuple[Row, Tensor, None] | Skipped] = []
    for found in group:
        if isinstance(found, Skipped):
            done.append(found)
            continue
        frames = next(pixels)
        if isinstance(frames, Exception):
            raise frames
        done.append((found[0], frames, None))
    return done
