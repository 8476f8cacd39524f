"""The samples as files: written completely or not at all; a message names a file that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from seppo_fast.data.rows import BadRow
from seppo_fast.data.video.source import found_video, listing
from seppo_fast.disk import NO_ROOM
from seppo_fast.errors import UserError
from seppo_fast.pictures import MILLISECONDS, picture, save_clip


def keep(pixels: Tensor, path: Path) -> None:
    """Write `(3, H, W)` in [0, 1] as a PNG, or `(F, 3, H, W)` as a lossless animated WebP; all of the file or nothing."""
    temporary = path.with_name(f".{path.name}")
    try:
        if path.suffix == ".png":
            picture(pixels).save(temporary, format="PNG")
        else:
            save_clip([picture(frame) for frame in pixels], temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        full = "; the disk is full" if error.errno in NO_ROOM else ""
        raise UserError(f"cannot write {path}: {error}{full}. What is drawn is kept: run the same command again") from error


def read_image(path: Path) -> Image.Image:
    """An RGB image."""
    with _explained(path), Image.open(path) as image:
        return image.convert("RGB")


def read_video(path: Path, frames: int) -> Tensor:
    """`(F, 3, H, W)` in [0, 1]. WebP stores equal frames as one that lasts longer."""
    with _explained(path), Image.open(path) as image:
        shown = [(torch.from_numpy(np.array(frame.convert("RGB"))), frame.info.get("duration", 0) // MILLISECONDS)
                 for frame in ImageSequence.Iterator(image)]
    times = torch.tensor([frames] if len(shown) == 1 else [lasts for _, lasts in shown])
    if int(times.sum()) != frames:
        raise UserError(f"{path} has {int(times.sum())} frames where {frames} were drawn; remove it, and the same command draws it"
                        " again")
    return torch.stack([frame for frame, _ in shown]).repeat_interleave(times, dim=0).permute(0, 3, 1, 2).float() / 255


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
