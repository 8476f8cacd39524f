"""Any image file to RGB, and RGB to the pixels that the VAE encodes (as DiffusionDPO's `train_transforms`)."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seppo_fast.data.framing import framing
from seppo_fast.data.rows import BadRow, ImageLike, open_image

# EXIF orientation -> what undoes it. `PIL.ImageOps.exif_transpose` also rewrites the EXIF, and fails on broken ones.
Turn = Image.Transpose
UPRIGHT = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE,
           6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}
ORIENTATION = 0x0112


def load_rgb(image: ImageLike | BadRow) -> Image.Image:
    """The whole image, upright, as 8-bit RGB; alpha is put on white. `BadRow` when it is unreadable or truncated."""
    opened = open_image(image)
    try:
        opened.load()
        upright = turned(opened)
        return flattened(upright)
    except MemoryError:
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise BadRow(f"unreadable or truncated image: {error}") from error


def turned(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation wants it seen."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not make the pixels bad
        orientation = 1
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def flattened(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16-bit and float greys scaled, transparency put on white."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips these to 0..255 instead of scaling them.
        image = Image.fromarray(grey_levels(np.asarray(image), image.mode))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def grey_levels(values: np.ndarray, mode: str) -> np.ndarray:
    """Greys (H, W) of 16 bits (modes I;16*), of 8 or 16 bits (mode I), or of floats in [0, 1] or [0, 255] -> uint8."""
    values = values.astype(np.float64)
    if mode == "F":
        top = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        top = 255.0 if mode == "I" and values.max(initial=0) <= 255 else 65535.0
    return np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8)


def prepare(image: Image.Image, resolution: int, crop: str, flip: bool, generator: torch.Generator) -> Tensor:
    """RGB -> (3, R, R) fp32 in [-1, 1]: short side to R (bilinear, antialiased), center or random crop, mirror."""
    framed = framing(*image.size, resolution, crop, flip, generator)
    size = (framed.width, framed.height)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image)[framed.top:framed.top + resolution, framed.left:framed.left + resolution]
    if framed.mirror:
        pixels = pixels[:, ::-1]
    chw = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return chw.to(torch.float32).div(255).sub(0.5).div(0.5)
