"""What demonstrations are, whatever the times of their files: digests of rows and files, kept with the cache.

Files whose names, sizes and times are as before are trusted. Where they are not, a finished cache of the same content is found by
reading the files once, so that a `touch`, a copy or an unpacked archive costs no new encoding.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from seppo_fast.data.fingerprint import digest
from seppo_fast.data.latents import row_shard
from seppo_fast.data.rows import BadRow, ImageLike, Part, Row, Skipped, Source, open_regular, read_bytes
from seppo_fast.data.shards import write_json
from seppo_fast.data.stamps import read_stamp
from seppo_fast.strict import parse_json

ABOUT, SAME = "fingerprint.json", "same_as.json"
AHEAD = 256  # rows that wait for a thread


class Content:
    """The digests of a part's rows, added by any thread in any order."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def add(self, row: Row | Skipped, files: Sequence[str] = ()) -> None:
        """A row, and the digests of its files."""
        said = ["unusable"] if isinstance(row, Skipped) else ["row", row.prompt, row.time_lapse]
        self.rows.append((json.dumps([row.key, *said]), json.dumps([row.key, *files])))

    def digests(self) -> dict[str, str]:
        """Of what the rows say, and of their files."""
        texts, files = (hashlib.sha256("\n".join(sorted(row[side] for row in self.rows)).encode()) for side in (0, 1))
        return {"texts": texts.hexdigest(), "files": files.hexdigest()}


def read_all(row: Row) -> list[ImageLike | BadRow]:
    """The content of a row's winner and loser, where they are files, or why they cannot be read."""
    found: list[ImageLike | BadRow] = []
    for image in (row.image, row.loser):
        if image is None:
            continue
        try:
            found.append(read_bytes(image) if isinstance(image, Path) else image)
        except BadRow as bad:
            found.append(bad)
    return found


def sha256_of(image: ImageLike | BadRow) -> str:
    """The digest of a file's content; a word where there is none."""
    if isinstance(image, Path):
        try:
            with open_regular(image) as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except (OSError, BadRow):
            return "unreadable"
    if isinstance(image, BadRow):
        return "unreadable"
    return hashlib.sha256(image.tobytes() if isinstance(image, Image.Image) else image).hexdigest()


def digests_of(part: Part, threads: ThreadPoolExecutor, files: bool = True) -> dict[str, str]:
    """A part's digests; without `files`, only what its rows say counts."""
    content, rows = Content(), []

    def add(row: Row | Skipped) -> None:
        images = (row.image, row.loser) if isinstance(row, Row) and files else ()
        content.add(row, [sha256_of(image) for image in images if image is not None])

    for row in part.rows():
        rows.append(threads.submit(add, row))
        if len(rows) == AHEAD:
            [each.result() for each in rows]
            rows = []
    [each.result() for each in rows]
    return content.digests()


def content_of(about: dict[str, Any], stamps: Sequence[dict[str, Any]]) -> str | None:
    """A digest of all that decides a cache's content, without names' times; None where an older program made the cache."""
    if not all("content" in stamp for stamp in stamps):
        return None
    return digest(timeless(about) | {"content": [stamp["content"] for stamp in stamps]})


def timeless(about: dict[str, Any]) -> dict[str, Any]:
    """`made_of` without what changes with the files' times."""
    return about | {"demonstrations": {name: value for name, value in about["demonstrations"].items() if name != "identity"}}


def same_content(about: dict[str, Any], source: Source, folder: Path, workers: int, say: Callable[[str], None]) -> Path | None:
    """The folder of a finished cache beside `folder` that holds just this content."""
    for other in sorted(folder.parent.glob(f"*/{ABOUT}")):
        stamps = finished(other, about, len(source.parts)) if other.parent != folder else None
        if stamps is None:
            continue
        say(f"{source.name}: names or times of files are not those of an earlier cache; comparing the content")
        with ThreadPoolExecutor(workers) as threads:
            pairs = list(zip(source.parts, stamps, strict=True))
            # Where rows name files, what they say is compared first: it costs no reading.
            if source.kind == "imagefolder" and any(
                    digests_of(part, threads, files=False)["texts"] != stamp["content"]["texts"] for part, stamp in pairs):
                continue
            if all(digests_of(part, threads) == stamp["content"] for part, stamp in pairs):
                return other.parent
    return None


def finished(other: Path, about: dict[str, Any], parts: int) -> list[dict[str, Any]] | None:
    """What was declared about each part of a cache that is made as `about` says; None when it is not finished or another."""
    said = read_about(other)
    if said is None or timeless(said) != timeless(about):
        return None
    stamps = [read_stamp(row_shard(other.parent, part)) for part in range(parts)]
    return stamps if all(stamp and "content" in stamp for stamp in stamps) else None


def read_about(file: Path) -> dict[str, Any] | None:
    """What a cache says that it is made of; None where it says nothing that can be read."""
    try:
        about = parse_json(file.read_bytes())
        return about if isinstance(about["demonstrations"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settle(folder: Path, about: dict[str, Any], source: Source, workers: int, rank: int, patience: float,
           barrier: Callable[[], None], say: Callable[[str], None]) -> Path:
    """The folder of this cache: `folder`, or another that rank 0 found to hold the same content."""
    if rank == 0 and read_about(folder / ABOUT) != about:
        other = same_content(about, source, folder, workers, say)
        if other is not None:
            write_json(folder / SAME, {"folder": other.name})
        write_json(folder / ABOUT, about)
    barrier()
    give_up = time.monotonic() + patience
    while read_about(folder / ABOUT) != about and time.monotonic() < give_up:
        time.sleep(0.2)
    try:
        other = folder.parent / json.loads((folder / SAME).read_bytes())["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return folder
    return other if finished(other / ABOUT, about, len(source.parts)) is not None else folder
