"""The samples as files: written completely or not at all; a message names a file that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from seppo_fast.checksums import checksum, checksum_of
from seppo_fast.data.rows import BadRow
from seppo_fast.data.video.source import found_video, listing
from seppo_fast.disk import NO_ROOM
from seppo_fast.errors import UserError
from seppo_fast.pictures import picture, save_clip

IMPROVES = "improves"  # the key in a PNG that has the checksum of the file that it is an improvement of


def keep(pixels: Tensor, path: Path, rate: int, source: str | None = None) -> None:
    """Write `(3, H, W)` in [0, 1] as a PNG, or `(F, 3, H, W)` as a lossless animated WebP; all of the file or nothing.

    `rate` is the frames a second. `source` is noted in a PNG: the checksum of the file that it is an improvement of.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        if path.suffix == ".png":
            notes = PngInfo()
            if source is not None:
                notes.add_text(IMPROVES, source)
            picture(pixels).save(temporary, format="PNG", pnginfo=notes)
        else:
            save_clip([picture(frame) for frame in pixels], rate, temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        full = "; the disk is full" if error.errno in NO_ROOM else ""
        raise UserError(f"cannot write {path}: {error}{full}. What is drawn is kept: run the same command again") from error


def is_improvement(path: Path, source: Path) -> bool:
    """Whether `path` is a PNG that was made of `source` as it is now."""
    with _explained(source):
        if not path.is_file():
            return False
        digest = checksum(source)
    try:
        with Image.open(path) as image:
            return image.info.get(IMPROVES) == digest
    except (OSError, SyntaxError, ValueError):
        return False


def read_source(path: Path, side: int) -> tuple[Tensor, str]:
    """A sample that is to be improved, `(1, 3, side, side)` in [-1, 1], and its file's checksum."""
    with _explained(path):
        content = path.read_bytes()
        with Image.open(BytesIO(content)) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
    if pixels.shape[:2] != (side, side):
        raise UserError(f"{path} has {pixels.shape[1]}x{pixels.shape[0]} pixels, and was to have {side}x{side}; remove it, and the"
                        " same command draws it again")
    return (pixels.permute(2, 0, 1)[None].float() / 255 * 2 - 1), checksum_of(content)


def read_image(path: Path) -> Image.Image:
    """An RGB image."""
    with _explained(path), Image.open(path) as image:
        return image.convert("RGB")


def read_video(path: Path, frames: int) -> Tensor:
    """`(F, 3, H, W)` in [0, 1]. WebP stores equal frames as one that lasts longer, and the time of one is the F-th part of all."""
    with _explained(path), Image.open(path) as image:
        shown = [(torch.from_numpy(np.array(frame.convert("RGB"))), frame.info.get("duration", 0))
                 for frame in ImageSequence.Iterator(image)]
    pictures, lasting = zip(*shown, strict=True)
    each = sum(lasting) / frames
    times = [frames] if len(shown) == 1 else [round(time / each) if each else 0 for time in lasting]
    if len(shown) > 1 and (not each or [each * time for time in times] != [*lasting]):
        raise UserError(f"{path} does not have the {frames} frames that were drawn; remove it, and the same command draws it again")
    return torch.stack(pictures).repeat_interleave(torch.tensor(times), dim=0).permute(0, 3, 1, 2).float() / 255


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
        raise UserError(f"{path} cannot be read ({error}); remove it, and the same command draws it again") from error


def clip_file(folder: Path, clip: str) -> Path:
    """The real clip of this id or file name."""
    try:
        return found_video({folder: _names_in(folder, folder.stat().st_mtime_ns)}, clip)
    except BadRow as bad:
        raise UserError(f"the real clip {clip!r}: {bad}") from bad


@lru_cache(maxsize=1)
def _names_in(folder: Path, changed: int) -> dict[str, str]:
    """The names in a folder. `changed` is the folder's time of change: a new one makes the cache read the folder again."""
    return listing(folder)
