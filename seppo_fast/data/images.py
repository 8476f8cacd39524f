"""Any image file to RGB, and RGB to the pixels that the VAE encodes (as DiffusionDPO's `train_transforms`)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seppo_fast.data.colours import check_signal, to_srgb
from seppo_fast.data.framing import Framing, framed_alike, framing
from seppo_fast.data.rows import BadRow, ImageLike, open_image, read_bytes

# EXIF orientation -> what undoes it. `PIL.ImageOps.exif_transpose` also rewrites the EXIF, and fails on broken ones.
Turn = Image.Transpose
UPRIGHT = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE,
           6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}
ORIENTATION = 0x0112
# Their further pictures are of another eye, a gain map, or the layers of which the first is made.
ONE_PICTURE = ("MPO", "PSD")
PAGE, BITS, PHOTOMETRIC = 254, 258, 262  # TIFF's tags
REDUCED, MASK, WHITE_IS_ZERO = 1, 4, 0  # bits of PAGE, a value of PHOTOMETRIC
OVERSHOOT = 1.05  # what a filter may add to the white of floats


def load_rgb(image: ImageLike | BadRow) -> Image.Image:
    """The whole image, upright, as 8-bit sRGB; alpha is put on white.

    `BadRow` when it is unreadable or truncated, has several frames or pages, or colours that sRGB cannot show.
    """
    if isinstance(image, Path):
        image = read_bytes(image)
    opened = open_image(image)
    try:
        if isinstance(image, bytes):
            check_signal(image, opened)
        check_single(opened)
        scale_key(opened)
        opened.load()
        return turned(flattened(opened), opened)
    except (MemoryError, BadRow):
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise BadRow(f"unreadable or truncated image: {error}") from error


def check_single(image: Image.Image) -> None:
    """`BadRow` for an animation, several pages, or a thumbnail that stands before the picture (DNG and other raw files)."""
    if image.format in ONE_PICTURE or not getattr(image, "is_animated", False):
        several = 1
    elif image.format == "TIFF":
        several = len(pages(image))
    else:
        several = image.n_frames
    if several > 1:
        frame = "page" if image.format == "TIFF" else "frame"
        raise BadRow(f"{image.format} of {several} {frame}s, and only a still image can be used; save as one the {frame} that the"
                     " caption means")
    if image.format == "TIFF" and image.tag_v2.get(PAGE, 0) & REDUCED:
        raise BadRow("its first picture is the thumbnail of another one, which Pillow does not read; convert it to PNG")


def pages(image: Image.Image) -> list[int]:
    """The pages of a TIFF that are no smaller copies or masks of others."""
    found = []
    for page in range(image.n_frames):
        image.seek(page)
        if not image.tag_v2.get(PAGE, 0) & (REDUCED | MASK):
            found.append(page)
    image.seek(0)
    return found


def scale_key(image: Image.Image) -> None:
    """A PNG's transparent colour in the levels of its pixels: Pillow scales 2-bit and 4-bit pixels, and not the colour."""
    if image.format != "PNG" or "transparency" not in image.info or not image.tile:
        return
    stored = image.tile[0].args
    if stored == "RGB;16B":
        raise BadRow("a PNG of 16-bit colours, one of them transparent, which Pillow does not tell from its neighbours; convert it"
                     " to RGBA")
    if image.mode == "L":
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(stored, 1)


def turned(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """The pixels as the EXIF orientation of their image wants them seen."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not make the pixels bad
        orientation = 1
    return pixels.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else pixels


def flattened(image: Image.Image) -> Image.Image:
    """Any mode to sRGB: 16-bit and float greys scaled, transparency put on white."""
    alpha = opacity(image)
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips these to 0..255 instead of scaling them.
        info, image = image.info, Image.fromarray(grey_levels(np.asarray(image), image.mode, *tiff_greys(image)))
        image.info = info
    rgb = to_srgb(image)
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return on_white(rgb)


def on_white(rgba: Image.Image) -> Image.Image:
    """RGBA -> RGB."""
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def opacity(image: Image.Image) -> Image.Image | None:
    """The alpha (mode L) of an image that has one, or a transparent colour."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):  # Pillow's conversion loses the transparent grey
        return Image.fromarray(np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8))
    return image.convert("RGBA").getchannel("A")


def tiff_greys(image: Image.Image) -> tuple[int, bool]:
    """(bits, whether 0 is white) of the greys of a TIFF: Pillow reads 12 bits, and 16 bits and floats from white, as they are."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS, (16,))[0] if image.mode.startswith("I;") else 16
    return bits, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def grey_levels(values: np.ndarray, mode: str, bits: int = 16, negative: bool = False) -> np.ndarray:
    """Greys (H, W) of 12 or 16 bits (modes I;16*), of 8 or 16 bits (mode I), or of floats in [0, 1] or [0, 255] -> uint8."""
    values = values.astype(np.float64)
    low, high = values.min(initial=0), values.max(initial=0)
    if mode == "F":
        top = 1.0 if high <= OVERSHOOT else 255.0
        known = -0.05 * top <= low and (high <= OVERSHOOT or 2 < high <= 255 * OVERSHOOT)
    else:
        top = 255.0 if mode == "I" and high <= 255 else 2.0**bits - 1
        known = 0 <= low and high <= top
    if not known:  # a NaN is not, either
        raise BadRow(f"grey levels from {low:g} to {high:g}, of which white is not known; [0, 1], [0, 255] and [0, 65535] are")
    values = values * (255 / top)
    return np.clip(np.rint(255 - values if negative else values), 0, 255).astype(np.uint8)


def prepare(image: Image.Image, resolution: int, crop: str, flip: bool, generator: torch.Generator) -> Tensor:
    """RGB -> (3, R, R) fp32 in [-1, 1]: short side to R (bilinear, antialiased), center or random crop, mirror."""
    return prepare_alike([image], resolution, crop, flip, generator)[0]


def prepare_alike(images: Sequence[Image.Image], resolution: int, crop: str, flip: bool, generator: torch.Generator
                  ) -> list[Tensor]:
    """`prepare` for pictures that belong together: the others are cropped and mirrored as the first is, whatever their sizes."""
    first = framing(*images[0].size, resolution, crop, flip, generator)
    others = [framed_alike(first, *image.size, resolution, crop) for image in images[1:]]
    return [square(image, framed, resolution) for image, framed in zip(images, (first, *others), strict=True)]


def square(image: Image.Image, framed: Framing, resolution: int) -> Tensor:
    """The part of an RGB image that the model sees, (3, R, R) fp32 in [-1, 1]."""
    size = (framed.width, framed.height)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = np.asarray(image)[framed.top:framed.top + resolution, framed.left:framed.left + resolution]
    if framed.mirror:
        pixels = pixels[:, ::-1]
    chw = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return chw.to(torch.float32).div(255).sub(0.5).div(0.5)
