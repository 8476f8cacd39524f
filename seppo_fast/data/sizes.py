"""How large pictures are; only their headers are read."""

from pathlib import Path

from PIL import Image

from seppo_fast.data.rows import ImageLike, open_image
from seppo_fast.opening import open_regular

BLURRED = 2  # a picture that is enlarged more is mostly the resampling filter's


def size_of(image: ImageLike) -> tuple[int, int] | None:
    """Width and height; None for what is no picture (it is reported when it is encoded)."""
    try:
        if not isinstance(image, Path):
            return open_image(image).size
        with open_regular(image) as stream, Image.open(stream) as opened:
            return opened.size
    except Exception:  # whatever a format's parser raises
        return None


def is_blurred(size: tuple[int, int], resolution: int) -> bool:
    """Whether a picture is enlarged more than `BLURRED` times, so that its short side has `resolution` pixels."""
    return BLURRED * min(size) < resolution


def enlarged(sizes: dict[str, tuple[int, int]], resolution: int) -> str:
    """The line that says how many pictures are very small, and which is the smallest; empty where none is. `sizes` by key."""
    small = {key: size for key, size in sizes.items() if is_blurred(size, resolution)}
    if not small:
        return ""
    key, (width, height) = min(small.items(), key=lambda item: min(item[1]))
    return (f"{len(small)} of {len(sizes)} enlarged more than {BLURRED} times to {resolution} pixels, the smallest is {key}"
            f" ({width}x{height}); leave them out, or lower seppo.data.resolution")
