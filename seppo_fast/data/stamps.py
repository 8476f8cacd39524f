"""The stamp: a JSON beside a finished Arrow file with its size and checksum, and what was learnt when it was made."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from tqdm import tqdm

from seppo_fast.checksums import Hashing, checksum
from seppo_fast.data.shards import write_json
from seppo_fast.strict import parse_json

CHECKSUM, SEAL = "xxh3_128", "seal"  # of the Arrow file, and of what else the JSON says
UNSEALED = ({"read": int, "rows": int, "ties": int, "skipped": list}, {"rows": int, "shapes": dict, "limit": int, "cut": list})


def declare(arrow: Path, written: Hashing, stamp: dict[str, Any]) -> None:
    """Writes the stamp of a finished Arrow file (already in its place); `written` is the stream that it was written through."""
    stamp = stamp | {"bytes": written.size, CHECKSUM: written.hexdigest()}
    write_json(arrow.with_suffix(".json"), stamp | {SEAL: seal_of(stamp)})


def read_stamp(arrow: Path) -> dict[str, Any] | None:
    """The stamp of a finished Arrow file; None when either is missing, cut off or damaged."""
    try:
        stamp = parse_json(arrow.with_suffix(".json").read_bytes())
        return stamp if stamp["bytes"] == arrow.stat().st_size and is_sound(stamp) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_sound(stamp: dict[str, Any]) -> bool:
    """Whether a stamp is undamaged, by its checksum; in one of an older version, which has none, by its keys."""
    if CHECKSUM in stamp or SEAL in stamp:
        return stamp[SEAL] == seal_of(stamp)
    return any(all(isinstance(stamp.get(name), kind) for name, kind in form.items()) for form in UNSEALED)


def seal_of(stamp: dict[str, Any]) -> str:
    """The checksum of a stamp itself."""
    content = {name: value for name, value in stamp.items() if name != SEAL}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def is_damaged(arrow: Path) -> bool:
    """Whether a finished Arrow file is damaged, by its checksum; one of an older version, whether it cannot be opened."""
    stamp = read_stamp(arrow)
    try:
        if stamp is None or CHECKSUM in stamp:
            return stamp is None or checksum(arrow) != stamp[CHECKSUM]
        with pa.memory_map(str(arrow)) as file:
            table = pa.ipc.open_stream(file).read_all()
            table.validate(full=True)
            return table.num_rows != stamp["rows"]
    except (OSError, pa.ArrowException):
        return True


def unusable(arrows: Mapping[int, Path], workers: int, show: bool) -> dict[int, bool]:
    """The numbers of the Arrow files that must be made, each with whether it is damaged (True) or missing. Reads all files.

    A disk that lost a bit leaves size and times as they were, so nothing is remembered from one start to the next: 500 GB take
    some minutes at a disk's speed, shared by the ranks, once a start.
    """
    there = {number: arrow for number, arrow in arrows.items() if read_stamp(arrow) is not None}
    damaged = set()
    with (ThreadPoolExecutor(workers) as threads,
          tqdm(desc="checking the cache", total=len(there), unit="file", disable=not show or not there, delay=2) as bar):
        for (number, arrow), bad in zip(there.items(), threads.map(is_damaged, there.values()), strict=True):
            bar.update()
            if bad:
                damaged.add(number)
                print(f"{arrow} is not what was written there: this part of the cache is damaged, and made anew", flush=True)
    return {number: number in damaged for number in arrows if number not in there or number in damaged}
