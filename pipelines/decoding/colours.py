"""Colours of images: whatever an image says of its own becomes 8-bit sRGB, what models know."""

from __future__ import annotations

import io
import logging
from functools import cache

from PIL import Image, ImageCms

from .profiles import told_profile

logger: logging.Logger = logging.getLogger(__name__)

# Of an ICC profile's header: when it was made, which would make every file another.
_DATE = slice(24, 36)
# By the space that a profile is of: the modes of images it can describe.
_MODES = {
    "RGB": ("RGB", "RGBA", "L", "LA"),
    "GRAY": ("L", "LA"),
    "CMYK": ("CMYK",),
    "LAB": ("LAB",),
}


def to_srgb(image: Image.Image, who: str) -> Image.Image:
    """An image in 8-bit sRGB, by its ICC profile or what else it says, see `told_profile`.

    Args:
        image: of any mode; as it was when this returns.
        who: what an error and a warning begin with.

    Returns:
        Of mode RGB, or RGBA where a pixel is not opaque. Without a profile. A profile that is
        broken, or of other colours than the image has, is left out with a warning.

    Raises:
        ValueError: over 8 bits a channel: which values are black and white is not known; or HDR.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{who} has more than 8 bits a channel (mode {image.mode}); scale it and convert it "
            "to RGB."
        )
    image.load()  # so that a damaged file is not taken for a broken profile
    profile = image.info.get("icc_profile") or told_profile(image, who)
    plain = _plain(image)
    if profile == srgb_profile():
        profile = None
    found = _by_profile(plain, profile, who) if profile else None
    if found is None and plain.mode == "LAB":
        found = _by_profile(plain, _lab_profile(), who)
    if found is None:
        found = plain.convert("RGBA" if plain.mode in ("LA", "RGBA") else "RGB")
    for name in ("icc_profile", "transparency", "gamma", "chromaticity", "srgb", "cicp"):
        found.info.pop(name, None)
    return found


def to_rgb(image: Image.Image, who: str) -> Image.Image:
    """As `to_srgb`, of mode RGB.

    Raises:
        ValueError: over 8 bits a channel, or not opaque everywhere.
    """
    found = to_srgb(image, who)
    if found.mode != "RGB":
        raise ValueError(
            f"{who} has an alpha channel (mode {image.mode}); paste it onto a background and "
            "convert it to RGB."
        )
    return found


@cache
def srgb_profile() -> bytes:
    """The ICC profile of sRGB, the same bytes in every process."""
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return made[: _DATE.start] + bytes(_DATE.stop - _DATE.start) + made[_DATE.stop :]


@cache
def _lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def _plain(image: Image.Image) -> Image.Image:
    """Of mode L, LA, RGB, RGBA, CMYK or LAB; without alpha if it is opaque everywhere."""
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA", "La", "1")
        whole = image.convert("LA" if image.mode in ("LA", "La") else "RGBA")
        least, _ = whole.getchannel("A").getextrema()
        if least == 255:
            whole = whole.convert("L" if grey else "RGB")
        return whole
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB")


def _by_profile(image: Image.Image, profile: bytes, who: str) -> Image.Image | None:
    """An image of `_plain` in sRGB; None, and a warning, where its profile cannot say how."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip().upper()
        if image.mode not in _MODES.get(space, ()):
            logger.warning(
                "%s: its ICC profile is for %s and the image is %s; it is left out, and colours "
                "may be off.",
                who,
                space,
                image.mode,
            )
            return None
        alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
        # Of a grey image an RGB profile says how light its values are.
        mode = "L" if space == "GRAY" else space
        target = ImageCms.ImageCmsProfile(io.BytesIO(srgb_profile()))
        found = ImageCms.profileToProfile(image.convert(mode), source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        logger.warning(
            "%s: its ICC profile is broken (%s); it is left out, and colours may be off.",
            who,
            error,
        )
        return None
    assert found is not None, "only a transform in place returns None"
    if alpha is not None:
        found.putalpha(alpha)
    return found
