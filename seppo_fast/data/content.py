"""Whether demonstrations have changed, judged by their content: digests of rows and files, kept with the cache.

Files whose names, sizes and times (mtime and ctime) are as before are trusted. Where they are not, the files are read once and
compared with finished caches, so that a `touch`, a copy or an unpacked archive costs no new encoding.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from seppo_fast.data.fingerprint import digest
from seppo_fast.data.latents import row_shard
from seppo_fast.data.rows import BadRow, ImageLike, Part, Row, Skipped, Source, read_bytes
from seppo_fast.data.shards import clear_errors, write_json
from seppo_fast.data.stamps import read_stamp
from seppo_fast.errors import UserError
from seppo_fast.opening import open_regular
from seppo_fast.strict import parse_json

ABOUT, SAME = "fingerprint.json", "same_as.json"
AHEAD = 256  # rows that wait for a thread


class Content:
    """The digests of a part's rows, added by any thread in any order."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def add(self, row: Row | Skipped, files: Sequence[str] = ()) -> None:
        """A row, and the digests of its files."""
        about = ["unusable"] if isinstance(row, Skipped) else ["row", row.prompt, row.time_lapse]
        self.rows.append((json.dumps([row.key, *about]), json.dumps([row.key, *files])))

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
    """The digest of an image's content, or "unreadable"."""
    if isinstance(image, Path):
        try:
            with open_regular(image) as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            return "unreadable"
    if isinstance(image, BadRow):
        return "unreadable"
    return hashlib.sha256(image.tobytes() if isinstance(image, Image.Image) else image).hexdigest()


def digests_of(part: Part, threads: ThreadPoolExecutor, files: bool = True) -> dict[str, str]:
    """A part's digests; without `files` no file is read, and only the digest of the texts is right."""
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
    """A digest of all that decides a cache's content, but not of its files' times; None for a cache of an older version."""
    if not all("content" in stamp for stamp in stamps):
        return None
    return digest(timeless(about) | {"content": [stamp["content"] for stamp in stamps]})


def timeless(about: dict[str, Any]) -> dict[str, Any]:
    """`made_of` without what changes with the files' times."""
    return about | {"demonstrations": {name: value for name, value in about["demonstrations"].items() if name != "identity"}}


def same_content(about: dict[str, Any], source: Source, folder: Path, workers: int, say: Callable[[str], None]) -> Path | None:
    """The folder of a finished cache beside `folder` that holds just this content."""
    for other in sorted(file.parent for file in folder.parent.glob(f"*/{ABOUT}")):
        stamps = finished(other, about, len(source.parts)) if other != folder else None
        if stamps is None:
            continue
        say(f"{source.name}: names or times of files are not those of an earlier cache; comparing the content")
        with ThreadPoolExecutor(workers) as threads:
            pairs = list(zip(source.parts, stamps, strict=True))
            # Where rows name files, what they say is compared first: it costs no reading.
            if source.kind in ("imagefolder", "captions") and any(
                    digests_of(part, threads, files=False)["texts"] != stamp["content"]["texts"] for part, stamp in pairs):
                continue
            if all(digests_of(part, threads) == stamp["content"] for part, stamp in pairs):
                return other
    return None


def finished(folder: Path, about: dict[str, Any], parts: int) -> list[dict[str, Any]] | None:
    """The stamp of each part of a cache; None when the cache is not finished, or not made as `about` says."""
    found, _ = read_about(folder)
    if found is None or timeless(found) != timeless(about):
        return None
    stamps = [read_stamp(row_shard(folder, part)) for part in range(parts)]
    return stamps if all(stamp and "content" in stamp for stamp in stamps) else None


def read_about(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """What a cache is made of, and when the files of its parts had been written; (None, []) where that cannot be read."""
    try:
        about = parse_json((folder / ABOUT).read_bytes())
        written = about.pop("written", [])
        return (about, written) if isinstance(about["demonstrations"], dict) and isinstance(written, list) else (None, [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, []


def settle(folder: Path, about: dict[str, Any], source: Source, holds: str, written: list[str], workers: int, rank: int,
           patience: float, barrier: Callable[[], None], say: Callable[[str], None]) -> Path:
    """The folder of this cache: `folder`, or another that rank 0 found to hold the same content.

    What is known of clips, not their latents, holds their files' times, and is made anew for other times.
    """
    if rank == 0:
        before, compared = read_about(folder)
        if before != about and holds == "latents":
            other = same_content(about, source, folder, workers, say)
            if other is not None:
                write_json(folder / SAME, {"folder": other.name, "content": contents_of(finished(other, about, len(source.parts)))})
                compared = written
        if compared != written:
            compare_again(folder, about, source, holds, compared, written, workers, say)
        if (before, compared) != (about, written):
            remember(folder, about, written, must=before != about)
    barrier()
    give_up = time.monotonic() + patience
    while read_about(folder)[0] != about and time.monotonic() < give_up:
        time.sleep(0.2)
    return same_as(folder, about, len(source.parts)) or folder


def contents_of(stamps: Sequence[dict[str, Any]] | None) -> str | None:
    """A digest of all parts' content; None of an unfinished cache."""
    return None if stamps is None else digest({"content": [stamp["content"] for stamp in stamps]})


def same_as(folder: Path, about: dict[str, Any], parts: int) -> Path | None:
    """The other cache that was found to have the same content as this one, if it still has."""
    try:
        found = parse_json((folder / SAME).read_bytes())
        other = folder.parent / found["folder"]
        stamps = finished(other, about, parts)
        # An older program did not say which content.
        return other if stamps and found.get("content") in (None, contents_of(stamps)) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def compare_again(folder: Path, about: dict[str, Any], source: Source, holds: str, compared: list[str], written: list[str],
                  workers: int, say: Callable[[str], None]) -> None:
    """Compares the content of parts whose files were written to since the last comparison; changed parts will be encoded anew."""
    place = same_as(folder, about, len(source.parts)) or folder
    stamps = {part: read_stamp(row_shard(place, part, holds)) for part, when in enumerate(written)
              if compared[part:part + 1] != [when]}
    known = {part: stamp["content"] for part, stamp in stamps.items() if stamp and "content" in stamp}
    if not known:
        return
    say(f"{source.name}: files were written to since they were encoded, though names, sizes and times are as before; comparing the"
        " content")
    with ThreadPoolExecutor(workers) as threads:
        changed = [part for part, content in known.items() if digests_of(source.parts[part], threads) != content]
    if not changed:
        return
    say(f"{source.name}: the content of files is another; of {len(source.parts)} parts {len(changed)} are encoded anew")
    with clear_errors(place):
        for file in [folder / SAME] if place != folder else [row_shard(place, part, holds) for part in changed]:
            file.with_suffix(".json").unlink()


def remember(folder: Path, about: dict[str, Any], written: list[str], must: bool) -> None:
    """Writes what a cache is made of. Where we may only read the cache, it is compared again at the next start."""
    with nullcontext() if must else suppress(UserError):
        write_json(folder / ABOUT, about | {"written": written})
