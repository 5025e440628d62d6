"""What a file is that Pillow does not open, by its first bytes: so that errors can name it."""

from __future__ import annotations

_BEGINNINGS = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"II\xbc": "JPEG XR",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"FUJIFILM": "camera raw",
    b"IIRO": "camera raw",
    b"IIU\0": "camera raw",
    b"FOVb": "camera raw",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"#?RGBE": "Radiance HDR",
    b"gimp xcf": "GIMP",
    b"AT&TFORM": "DjVu",
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"8BPS": "Photoshop",
    b"BM": "BMP",
    b"FLIF": "FLIF",
    b"BPG\xfb": "BPG",
    b"SDPX": "DPX",
    b"XPDS": "DPX",
    b"\x8aMNG": "MNG",
    b"\0MRM": "camera raw",
    b"PK\x03\x04": "ZIP (Krita and OpenRaster are)",
    b"<!doctype html": "HTML, a web page",
    b"<html": "HTML, a web page",
    b"<svg": "SVG",
    b"<?xml": "SVG or XML",
    b"%PDF": "PDF",
    b"\x1aE\xdf\xa3": "film",
}
# The brands that a file beginning with "ftyp" has: of coders, and of the container alone.
_HEVC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_CONTAINER = {b"mif1", b"mif2", b"msf1"}
_AV1 = {b"avif", b"avis"}


def kind_of(head: bytes) -> str | None:
    """The kind of a file, such as "JPEG XL"; None where it is not known.

    Args:
        head: at least the first 132 bytes, if it has so many.
    """
    if is_heif(head):
        return "HEIC"
    brands = _brands(head)
    if brands:
        if _AV1 & {*brands}:
            return "AVIF"
        return "camera raw" if brands[0] == b"crx " else "film"
    if head[128:132] == b"DICM":
        return "DICOM"
    if head[:4] == b"RIFF":
        return "WebP" if head[8:12] == b"WEBP" else None
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning) or text.startswith(beginning):
            return kind
    return None


def is_heif(head: bytes) -> bool:
    """Whether it is HEIF, and not the AVIF that Pillow reads itself."""
    brands = _brands(head)
    if not brands or brands[0] in _AV1:
        return False
    return brands[0] in _HEVC or (brands[0] in _CONTAINER and not _AV1 & {*brands})


def _brands(head: bytes) -> list[bytes]:
    """Those of ISO 14496-12's file type box, the major one first."""
    if head[4:8] != b"ftyp":
        return []
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return [head[8:12], *(head[at : at + 4] for at in range(16, end, 4))]
