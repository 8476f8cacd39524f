"""Images that parse as something else than they are: colours of other profiles, transparent levels, animations, pages."""

import struct

import numpy as np
import pytest
from data.data_files import cached, listed, pixels, settings, write_folder
from data.image_files import ADOBE_RGB, DISPLAY_P3, cmyk_profile, grey_profile, png, rgb_profile
from data.test_images import colour, stored
from PIL import Image, ImageCms

from seppo_fast.data.images import load_rgb
from seppo_fast.data.rows import BadRow

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
BROKEN = rgb_profile(ADOBE_RGB, 2.2)[:200]


def near(found: tuple[int, ...], expected: tuple[int, ...], levels: int = 2) -> bool:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= levels


# Expected: the matrices of Adobe RGB (1998) and Display P3 to that of sRGB, in linear light.
@pytest.mark.parametrize(("profile", "stored_as", "expected"), [
    (rgb_profile(ADOBE_RGB, 563 / 256), (100, 150, 100), (66, 151, 97)),
    (rgb_profile(DISPLAY_P3, 2.2), (200, 100, 100), (214, 94, 97)),
    (rgb_profile(DISPLAY_P3, 2.2), (255, 0, 0), (255, 0, 0)),
], ids=["adobe", "p3", "out-of-gamut"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF", "JPEG"])
def test_a_profile_is_converted(profile, stored_as, expected, kind):
    options = {"lossless": True} if kind == "WEBP" else {} if kind in ("PNG", "TIFF") else {"quality": 100}
    assert near(colour(stored(Image.new("RGB", (16, 16), stored_as), kind, icc_profile=profile, **options)), expected, 4)


def test_a_profile_of_a_jpeg_2000_is_converted():
    content = stored(Image.new("RGB", (16, 16), (200, 100, 100)), "JPEG2000")
    header, colr = content.index(b"jp2h") - 4, content.index(b"colr") - 4
    profile = rgb_profile(DISPLAY_P3, 2.2)
    box = struct.pack(">I4s3B", 11 + len(profile), b"colr", 2, 0, 0) + profile
    longer = struct.pack(">I", int.from_bytes(content[header:header + 4]) + len(box) - 15)
    changed = content[:header] + longer + content[header + 4:colr] + box + content[colr + 15:]
    assert near(colour(content), (200, 100, 100)) and near(colour(changed), (214, 94, 97), 4)


def test_a_profile_is_converted_in_every_mode():
    p3, rgb, expected = rgb_profile(DISPLAY_P3, 2.2), (200, 100, 100), (214, 94, 97)
    palette = Image.new("RGB", (4, 4), rgb).convert("P", palette=Image.Palette.ADAPTIVE)
    assert near(colour(stored(palette, icc_profile=p3)), expected)
    assert near(colour(stored(Image.new("RGBA", (4, 4), (*rgb, 255)), icc_profile=p3)), expected)
    assert colour(stored(Image.new("RGBA", (4, 4), (*rgb, 0)), icc_profile=p3)) == (255, 255, 255)
    dark = grey_profile(1.0)  # half the light is level 188 of sRGB
    deep = Image.fromarray(np.full((4, 4), 32896, np.uint16))
    for image in (Image.new("L", (4, 4), 128), Image.new("LA", (4, 4), (128, 255)), deep):
        assert near(colour(stored(image, icc_profile=dark)), (188, 188, 188)), image.mode
    assert near(colour(stored(Image.new("L", (4, 4), 128), icc_profile=rgb_profile(DISPLAY_P3, 1.0))), (188, 188, 188))


def test_cmyk_with_a_profile_has_its_inks():
    green = cmyk_profile((128, 40, 160))
    for ink in ((255, 0, 0, 0), (0, 0, 0, 255)):
        image = Image.new("CMYK", (16, 16), ink)
        found = colour(stored(image, "TIFF", icc_profile=green))
        assert found[0] < 60 and found[1] > 110 and found[2] < 130
        assert near(colour(stored(image, "JPEG", icc_profile=green, quality=100)), found, 5)
    assert near(colour(stored(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "TIFF", icc_profile=green)), (255, 255, 255))


@pytest.mark.parametrize(("image", "profile"), [
    (Image.fromarray(pixels(0)), SRGB), (Image.fromarray(pixels(0)), BROKEN), (Image.fromarray(pixels(0)), b"no profile"),
    (Image.fromarray(pixels(0)), grey_profile(1.0)), (Image.fromarray(pixels(0)), cmyk_profile((128, 40, 160))),
    (Image.fromarray(pixels(0)).convert("L"), SRGB), (Image.fromarray(pixels(0)).convert("L"), grey_profile(1.0)[:170]),
], ids=["srgb", "broken", "nonsense", "grey on rgb", "cmyk on rgb", "srgb on grey", "broken grey"])
def test_a_profile_that_says_nothing_else_leaves_every_bit(image, profile):
    assert np.array_equal(np.asarray(load_rgb(stored(image, icc_profile=profile))), np.asarray(image.convert("RGB")))


def test_lab_is_converted():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (4, 4), (200, 30, 40)), to_lab)
    assert near(colour(stored(lab, "TIFF")), (200, 30, 40), 3)
    assert near(colour(stored(lab, "TIFF", icc_profile=rgb_profile(ADOBE_RGB, 2.2))), (200, 30, 40), 3)


GREY = bytes([0, 0, 0, 128, 128, 128])
RED = bytes([0, 0, 0, 200, 0, 0])
P3_PRIMARIES = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB_PRIMARIES = struct.pack(">8I", 31269, 32899, 63999, 33001, 30000, 60000, 15000, 5999)


@pytest.mark.parametrize(("row", "chunks", "expected"), [
    (GREY, [(b"gAMA", 100000)], 186), (GREY, [(b"gAMA", 45455)], 128), (GREY, [(b"gAMA", 0)], 128),
    (GREY, [(b"sRGB", b"\0"), (b"gAMA", 100000)], 128), (GREY, [(b"cICP", bytes([1, 13, 0, 1]))], 128),
    (GREY, [(b"cHRM", SRGB_PRIMARIES)], 128), (GREY, [(b"cHRM", bytes(32))], 128),
    (GREY, [(b"sRGB", b"\0"), (b"cHRM", P3_PRIMARIES)], 128),
    (RED, [(b"cHRM", P3_PRIMARIES)], "primaries"), (RED, [(b"cICP", bytes([9, 16, 0, 1]))], "PQ"),
    (RED, [(b"cICP", bytes([9, 18, 0, 1]))], "HLG"), (RED, [(b"cICP", bytes([12, 13, 0, 1]))], "Display P3"),
], ids=["linear", "usual", "none", "srgb first", "cicp srgb", "srgb primaries", "no primaries", "srgb before primaries", "p3", "pq",
        "hlg", "cicp p3"])
def test_what_a_png_says_of_its_colours(row, chunks, expected):
    content = png(8, 2, row, *((name, value if isinstance(value, bytes) else struct.pack(">I", value)) for name, value in chunks))
    if isinstance(expected, str):
        with pytest.raises(BadRow, match=expected):
            load_rgb(content)
    else:
        assert colour(content) == (expected,) * 3


def test_an_avif_of_high_dynamic_range_is_no_image_of_srgb(tmp_path):
    content = stored(Image.fromarray(pixels(0)), "AVIF")
    place = content.index(b"colrnclx") + 8
    assert load_rgb(content).size == (16, 16)
    for primaries, transfer, reason in ((9, 16, "PQ"), (9, 18, "HLG"), (12, 13, "Display P3")):
        (tmp_path / "a.avif").write_bytes(content[:place] + struct.pack(">2H", primaries, transfer) + content[place + 4:])
        with pytest.raises(BadRow, match=reason):
            load_rgb(tmp_path / "a.avif")


def key(*levels: int) -> tuple[bytes, bytes]:
    return b"tRNS", struct.pack(f">{len(levels)}H", *levels)


# The second pixel of each is transparent, the first is black.
@pytest.mark.parametrize("content", [
    png(1, 0, b"\x40", key(1)), png(2, 0, b"\x10", key(1)), png(4, 0, b"\x05", key(5)), png(8, 0, b"\0\5", key(5)),
    png(16, 0, struct.pack(">2H", 0, 500), key(500)), png(8, 2, RED, key(200, 0, 0)),
    png(2, 3, b"\x10", (b"PLTE", RED), (b"tRNS", b"\xff\0")), png(16, 4, struct.pack(">4H", 0, 65535, 500, 0)),
], ids=["1-bit", "2-bit", "4-bit", "8-bit", "16-bit", "colour", "palette", "16-bit alpha"])
def test_a_transparent_level_lies_on_white(content):
    image = load_rgb(content)
    assert [image.getpixel((x, 1)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


def test_a_transparent_colour_of_16_bits_is_refused_and_its_neighbours_stay():
    with pytest.raises(BadRow, match="16-bit colours, one of them transparent"):
        load_rgb(png(16, 2, bytes(12), key(0, 0, 0)))
    assert colour(png(16, 2, 2 * struct.pack(">3H", 65535, 32896, 0))) == (255, 128, 0)
    assert colour(png(16, 0, struct.pack(">2H", 500, 25700), key(500))) == (100, 100, 100)


def tiff(values: np.ndarray, tag: int, value: int) -> bytes:
    """A TIFF of greys with another value of a tag of one short."""
    content = stored(Image.fromarray(values), "TIFF")
    place = content.index(struct.pack("<2HI", tag, 3, 1)) + 8
    return content[:place] + struct.pack("<H", value) + content[place + 2:]


def test_greys_of_a_tiff():
    white_is_zero = 262, 0
    assert colour(tiff(np.full((4, 4), 200, np.uint8), *white_is_zero)) == (55, 55, 55)
    assert colour(tiff(np.full((4, 4), 65535 - 32896, np.uint16), *white_is_zero)) == (128, 128, 128)
    assert colour(tiff(np.full((4, 4), 0.25, np.float32), *white_is_zero)) == (191, 191, 191)
    assert colour(tiff(np.full((4, 4), 65535, np.uint16), 258, 12)) == (255, 255, 255)


@pytest.mark.parametrize("values", [
    np.array([[0, 1.5]], np.float32), np.array([[-1, 1]], np.float32), np.array([[0, 4000]], np.float32),
    np.array([[0, np.nan]], np.float32), np.array([[0, 1 << 20]], np.int32), np.array([[-9, 100]], np.int32),
], ids=str)
def test_greys_of_which_white_is_not_known(values):
    with pytest.raises(BadRow, match="of which white is not known"):
        load_rgb(stored(Image.fromarray(values), "TIFF"))


def test_floats_a_little_beyond_white_are_white():
    assert colour(stored(Image.fromarray(np.full((4, 4), 1.01, np.float32)), "TIFF")) == (255, 255, 255)
    assert colour(stored(Image.fromarray(np.full((4, 4), 51, np.float32)), "TIFF")) == (51, 51, 51)


def several(kind: str, count: int, **options: object) -> bytes:
    first, *others = (Image.fromarray(pixels(i)) for i in range(count))
    return stored(first, kind, save_all=True, append_images=others, **options)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_of_an_animation_no_frame_is_taken(kind):
    what = "pages" if kind == "TIFF" else "frames"
    with pytest.raises(BadRow, match=rf"^{kind} of 3 {what}, and only a still image can be used"):
        load_rgb(several(kind, 3))
    assert load_rgb(several(kind, 1)).size == (16, 16)


def test_further_pictures_that_are_no_animation():
    assert np.array_equal(np.asarray(load_rgb(several("MPO", 2, quality=100))),
                          np.asarray(load_rgb(stored(Image.fromarray(pixels(0)), "JPEG", quality=100))))
    assert load_rgb(stored(Image.fromarray(pixels(0, 32, 32)), "ICO", sizes=[(16, 16), (32, 32)])).size == (32, 32)
    content = several("TIFF", 2, tiffinfo={254: 0})
    assert content.count(kind_of_page := struct.pack("<2HI", 254, 4, 1)) == 2
    first, second = content.index(kind_of_page) + 8, content.rindex(kind_of_page) + 8
    with_thumbnail = content[:second] + struct.pack("<I", 1) + content[second + 4:]
    assert np.array_equal(np.asarray(load_rgb(with_thumbnail)), pixels(0))
    raw = content[:first] + struct.pack("<I", 1) + content[first + 4:]
    with pytest.raises(BadRow, match="first picture is the thumbnail"):
        load_rgb(raw)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF", "JPEG"])
def test_orientation_in_every_format(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # turned right, upper left comes to upper right
    upright = load_rgb(stored(image, kind, exif=exif.tobytes()))
    assert upright.size == (16, 32)
    assert near(upright.getpixel((12, 4)), (255, 255, 255), 9) and near(upright.getpixel((4, 4)), (0, 0, 0), 9)


def test_skipped_rows_say_so(model, tmp_path):
    folder = write_folder(tmp_path / "images", 6, bad=[{"file_name": "moves.gif", "text": "it moves"}])
    (folder / "moves.gif").write_bytes(several("GIF", 2))
    assert len(cached(model, settings(folder, tmp_path, max_skipped=0.5), tmp_path)) == 6
    assert [row["reason"][:15] for row in listed(tmp_path)] == ["GIF of 2 frames"]


def test_associated_alpha_of_a_tiff_is_divided_out():
    image = Image.new("RGBA", (4, 4), (60, 0, 0, 60))  # ink times opacity: red, nearly transparent
    content = stored(image, "TIFF")
    place = content.index(struct.pack("<2HI", 338, 3, 1)) + 8
    associated = content[:place] + struct.pack("<H", 1) + content[place + 2:]
    assert near(colour(associated), (255, 195, 195))
