"""Demonstrations of every format, small and random, for the tests of the data section."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from seppo_fast import config
from seppo_fast.data import LatentCache, build_cache, open_source
from seppo_fast.data.rows import Row, Skipped
from seppo_fast.errors import UserError


def pixels(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    """Random RGB (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_bytes(seed: int = 0, kind: str = "PNG", height: int = 16, width: int = 16) -> bytes:
    """A random image file's content."""
    stream = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(stream, kind)
    return stream.getvalue()


def write_folder(folder: Path, count: int, bad: list[dict] | None = None, images: int = 20) -> Path:
    """An image folder of `count` good rows ("caption 0", ...) over `images` files, then the `bad` rows."""
    folder.mkdir(parents=True)
    for i in range(min(count, images)):
        (folder / f"{i}.png").write_bytes(image_bytes(i))
    rows = [{"file_name": f"{i % images}.png", "text": f"caption {i % 7}"} for i in range(count)] + (bad or [])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pair(seed: int, label: float | None, **more: object) -> dict:
    """A Pick-a-Pic row with random images."""
    return {"jpg_0": image_bytes(2 * seed), "jpg_1": image_bytes(2 * seed + 1), "label_0": label,
            "label_1": None if label is None else 1 - label, "caption": f"pair {seed}", **more}


def write_parquet(file: Path, rows: list[dict], group: int = 100) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=group)
    return file


def write_tar(file: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """WebDataset samples: a .png and a .txt each."""
    pairs = [(f"{i:04}", i) for i in range(first, first + count)]
    return [member for name, i in pairs
            for member in ((f"{name}.png", image_bytes(i)), (f"{name}.txt", f"caption {i}\n".encode()))]


def settings(source: object, folder: Path, **more: object) -> config.Data:
    """`config.Data` for tiny images, with the cache in `folder`/cache."""
    return config.Data(**{"source": str(source), "resolution": 16, "flip": False, "cache_dir": str(folder / "cache"),
                          "encode_batch_size": 4, "workers": 2, **more})


def rows_of(source: object, needs_loser: bool = False, seed: int = 0, **more: object) -> list[Row | Skipped]:
    """All rows of a source."""
    opened = open_source(settings(source, Path("unused"), **more), needs_loser, seed)
    return [row for part in opened.parts for row in part.rows()]


def refused(source: object, needs_loser: bool = False, **more: object) -> str:
    """What is said about a source that cannot be opened or read."""
    with pytest.raises(UserError) as caught:
        rows_of(source, needs_loser, **more)
    return str(caught.value)


def cached(model: object, data: config.Data, folder: Path, needs_loser: bool = False, seed: int = 0,
           **more: object) -> LatentCache:
    """Open `data.source`, build its cache, with skipped.jsonl in `folder`/run."""
    source = open_source(data, needs_loser, seed)
    return build_cache(source, model, data, seed=seed, needs_loser=needs_loser, output_dir=folder / "run",
                       progress=False, **more)


def listed(folder: Path) -> list[dict]:
    """What skipped.jsonl says."""
    return [json.loads(line) for line in (folder / "run" / "skipped.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
