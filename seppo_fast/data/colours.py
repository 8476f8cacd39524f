"""Converts the colours of files to sRGB: embedded profiles, a PNG's gamma. Refuses colours that cannot be converted here."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from seppo_fast.data.rows import BadRow

# ITU-T H.273, which PNG (cICP), AVIF and every video codec share. What is missing here, a screen for sRGB shows as it is.
WIDE = {4: "BT.470 M", 8: "film", 9: "BT.2020", 10: "CIE XYZ", 11: "DCI-P3", 12: "Display P3"}
CURVES = {8: "linear", 9: "logarithmic", 10: "logarithmic", 16: "PQ, as in HDR10", 17: "SMPTE 428", 18: "HLG"}
SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green, blue
SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
SAME = 2  # levels: a profile that changes less is sRGB under another name


def check_range(primaries: int | None, transfer: int | None) -> None:
    """`BadRow` when colours of these numbers of H.273 would look grey or pale as sRGB."""
    if transfer in CURVES:
        raise BadRow(f"its brightness is {CURVES[transfer]}, which is read as grey for white; convert it to SDR (BT.709 or sRGB)")
    if primaries in WIDE:
        raise BadRow(f"its colours are {WIDE[primaries]}'s, which are read as paler ones; convert it to BT.709 or sRGB")


def check_signal(content: bytes, image: Image.Image) -> None:
    """`check_range` for what Pillow passes over: a PNG's cICP, which goes before its profile, an AVIF's nclx, which goes after.

    A JPEG 2000's profile, which it passes over, too, is put where those of other formats are.
    """
    if image.format == "PNG":
        _, _, signal = content.partition(b"IDAT")[0].partition(b"cICP")
        check_range(*signal[:2].ljust(2, b"\0"))
    elif image.format == "AVIF" and "icc_profile" not in image.info:
        _, _, signal = content.partition(b"colrnclx")
        check_range(int.from_bytes(signal[:2]), int.from_bytes(signal[2:4]))
    elif image.format == "JPEG2000":
        _, _, box = content.partition(b"jp2c")[0].partition(b"colr")
        if box[:1] == b"\2":  # after it two bytes, then a profile, which knows its length
            image.info["icc_profile"] = box[3:]


def to_srgb(image: Image.Image) -> Image.Image:
    """8-bit pixels of any mode -> RGB without their alpha. A profile that is broken or of other pixels is none, as in browsers."""
    profile = image.info.get("icc_profile") if image.mode != "LAB" else None
    if image.mode != "CMYK":
        image = calibrated(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    convert = transform(profile, image.mode) if profile else None
    return convert.apply(image.convert(convert.input_mode)) if convert else image.convert("RGB")


@lru_cache(maxsize=64)
def transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB, relative to white and black; None where pixels of this mode are to stay as they are."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = SPACES.get(opened.profile.xcolor_space)
        if space is None or (space != mode and (space, mode) != ("RGB", "L")):
            return None
        found = ImageCms.ImageCmsTransform(opened, srgb(), space, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC,
                                           flags=ImageCms.Flags.BLACKPOINTCOMPENSATION)
        return None if space != "CMYK" and is_identity(found) else found
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None


@lru_cache(maxsize=1)
def srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def is_identity(convert: ImageCms.ImageCmsTransform) -> bool:
    """Whether no colour of a coarse cube moves by more than a rounding."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    image = Image.fromarray(cube).convert(convert.input_mode)
    before, after = (np.asarray(each, np.int16) for each in (image.convert("RGB"), convert.apply(image)))
    return bool(np.abs(after - before).max() <= SAME)


def calibrated(image: Image.Image) -> Image.Image:
    """A PNG's L or RGB after its gAMA, where nothing better tells its colours; `BadRow` where its cHRM has other primaries."""
    if image.info.get("icc_profile") or "srgb" in image.info:
        return image
    primaries = image.info.get("chromaticity")
    if primaries and image.mode == "RGB" and all(primaries) and np.abs(np.subtract(primaries, SRGB_PRIMARIES)).max() > 0.01:
        raise BadRow("its primaries (PNG's cHRM) are not those of sRGB, and it has no colour profile; convert it to sRGB")
    exponent = 1 / (2.2 * (image.info.get("gamma") or 1 / 2.2))
    if abs(exponent - 1) < 0.05:  # libpng's threshold
        return image
    table = np.rint(255 * (np.arange(256) / 255) ** exponent).astype(int).tolist()
    return image.point(table * len(image.getbands()))
