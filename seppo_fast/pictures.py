"""Tensors of pixels as pictures, and pictures as animations."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor


def picture(pixels: Tensor) -> Image.Image:
    """Pixels `(3, H, W)` in [0, 1] as a picture; values beyond are clipped."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def png(pixels: Tensor) -> bytes:
    """The file of a picture `(3, H, W)` in [0, 1]."""
    file = io.BytesIO()
    picture(pixels).save(file, "PNG")
    return file.getvalue()


def save_clip(frames: Sequence[Image.Image], rate: int, path: Path) -> None:
    """A lossless animated WebP that loops, at `rate` frames a second as far as whole milliseconds can say it."""
    first, *others = frames
    first.save(path, format="WEBP", save_all=True, append_images=others, duration=round(1000 / rate), loop=0, lossless=True)
