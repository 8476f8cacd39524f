"""The samples as files: written whole or not at all, read with a word on those that cannot be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from seppo_fast.data.video.source import SUFFIXES
from seppo_fast.disk import NO_ROOM
from seppo_fast.errors import UserError

MILLISECONDS = 125  # a frame: AnimateDiff's 8 a second


def keep(pixels: Tensor, path: Path) -> None:
    """`(3, H, W)` in [0, 1] as a PNG, `(F, 3, H, W)` as a lossless animated WebP; all of the file or nothing."""
    frames = [Image.fromarray(frame) for frame in
              (pixels.reshape(-1, *pixels.shape[-3:]) * 255).round().byte().permute(0, 2, 3, 1).numpy()]
    temporary = path.with_name(f".{path.name}")
    try:
        if path.suffix == ".png":
            frames[0].save(temporary, format="PNG")
        else:
            frames[0].save(temporary, format="WEBP", save_all=True, append_images=frames[1:], duration=MILLISECONDS, loop=0,
                           lossless=True)
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
    """`(F, 3, H, W)` in [0, 1]. WebP has frames that do not differ as one that lasts longer."""
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
    for name in (clip, *(clip + suffix for suffix in SUFFIXES)):
        if name.lower().endswith(SUFFIXES) and (folder / name).is_file():
            return folder / name
    raise UserError(f"the real clip {folder / clip} is not there, with {', '.join(SUFFIXES)}")
