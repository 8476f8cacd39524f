"""Files of every mode come out as upright RGB, and RGB as the pixels that DiffusionDPO encodes."""

import io

import numpy as np
import pytest
import torch
from data.data_files import image_bytes, pixels
from PIL import Image

from seppo_fast.data.images import load_rgb, prepare
from seppo_fast.data.rows import BadRow
from seppo_fast.seeds import generator


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def colour(content: bytes) -> tuple[int, ...]:
    image = load_rgb(content)
    assert image.mode == "RGB"
    return image.getpixel((1, 1))


@pytest.mark.parametrize(("image", "expected"), [
    (Image.new("RGB", (4, 4), (10, 20, 30)), (10, 20, 30)),
    (Image.new("L", (4, 4), 77), (77, 77, 77)),
    (Image.new("1", (4, 4), 1), (255, 255, 255)),
    (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255, 255, 255)),
    (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (127, 127, 127)),
    (Image.new("LA", (4, 4), (50, 255)), (50, 50, 50)),
    (Image.new("RGB", (4, 4), (250, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE), (250, 0, 0)),
    (Image.fromarray(np.full((4, 4), 32896, np.uint16)), (128, 128, 128)),
], ids=["rgb", "grey", "bit", "transparent", "half", "grey-alpha", "palette", "16-bit"])
def test_modes(image, expected):
    assert colour(stored(image)) == expected


def test_palette_with_a_transparent_colour_lies_on_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    assert colour(stored(image, transparency=1)) == (255, 255, 255)
    assert colour(stored(image, transparency=0)) == (200, 0, 0)


def test_cmyk_jpeg():
    red, green, blue = colour(stored(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert red > 200 and green < 60 and blue < 60


def test_float_and_32_bit_greys():
    assert colour(stored(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF")) == (128, 128, 128)
    assert colour(stored(Image.fromarray(np.full((4, 4), 65535, np.int32)), "TIFF")) == (255, 255, 255)
    assert colour(stored(Image.fromarray(np.full((4, 4), 200, np.int32)), "TIFF")) == (200, 200, 200)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = pixels(0, 16, 24)
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
            5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
            8: lambda a: np.rot90(a, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = stored(Image.fromarray(np.ascontiguousarray(undo(upright))), exif=exif.tobytes())
    assert np.array_equal(np.asarray(load_rgb(content)), upright)


def test_a_broken_exif_block_does_not_spoil_the_image():
    content = stored(Image.fromarray(pixels(0)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert load_rgb(content).size == (16, 16)


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "0 bytes"), (b"hello", "not an image"), (image_bytes(0, "PNG", 90, 90)[:9000], "truncated"),
    (image_bytes(0, "JPEG", 90, 90)[:2000], "truncated"),
], ids=["empty", "text", "cut png", "cut jpeg"])
def test_unreadable_files_are_bad_rows(content, reason, tmp_path):
    with pytest.raises(BadRow, match=reason):
        load_rgb(content)
    file = tmp_path / "a.png"
    file.write_bytes(content)
    with pytest.raises(BadRow, match=reason):
        load_rgb(file)


def coordinates(height: int, width: int) -> Image.Image:
    """Red is x, green is y."""
    grid = np.zeros((height, width, 3), np.uint8)
    grid[..., 0], grid[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(grid)


def corner(tensor: torch.Tensor) -> tuple[int, int]:
    """(x, y) of the upper left pixel of cropped coordinates."""
    return tuple(round((float(tensor[c, 0, 0]) * 0.5 + 0.5) * 255) for c in (0, 1))


def test_center_crop_takes_the_middle():
    assert corner(prepare(coordinates(16, 41), 16, "center", False, generator(0))) == (12, 0)
    assert corner(prepare(coordinates(41, 16), 16, "center", False, generator(0))) == (0, 12)


def test_random_crop_reaches_both_ends_and_flip_half():
    crops = [prepare(coordinates(16, 20), 16, "random", True, generator(i)) for i in range(400)]
    flipped = [bool(crop[0, 0, 0] > crop[0, 0, -1]) for crop in crops]
    lefts = {min(corner(crop)[0], corner(crop.flip(2))[0]) for crop in crops}
    assert lefts == {0, 1, 2, 3, 4}
    assert 150 < sum(flipped) < 250


def test_short_side_is_scaled_with_antialiasing_and_values_span_minus_one_to_one():
    image = Image.fromarray(np.tile(np.array([[0], [255]], np.uint8), (32, 100))).convert("RGB")
    tensor = prepare(image, 8, "center", False, generator(0))
    assert tensor.shape == (3, 8, 8) and tensor.dtype == torch.float32
    assert tensor.abs().max() < 0.1  # one-pixel stripes average to grey; without antialiasing they stay
    ends = prepare(Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (2, 1))).convert("RGB"), 2, "center", False,
                   generator(0))
    assert ends[0, 0].tolist() == [-1.0, 1.0]


def test_a_strip_is_refused_before_it_is_enlarged():
    with pytest.raises(BadRow, match="1x3000 pixels"):
        prepare(Image.new("RGB", (1, 3000)), 512, "center", False, generator(0))
