"""Uploads: what is read of their headers, and every pixel of what is kept."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.slow import slow

from clear_dit.app.uploads import check_upload, keep_upload
from clear_dit.errors import RequestError
from clear_dit.pipelines.decoding.colours import srgb_profile, to_srgb


def taken_in(path):
    check_upload(path)
    return keep_upload(path)


def kept(path):
    size = taken_in(path)
    with Image.open(path) as image, Image.open(path.with_suffix(".jpg")) as small:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", size)
        assert max(small.size) <= 320
        ratio = image.width / image.height
        assert small.width / small.height == pytest.approx(ratio, rel=0.1)
        return np.asarray(image)


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("size", [(37, 301), (301, 37), (1, 1)])
def test_turned_as_the_camera_says(tmp_path, turn, size):
    image = Image.fromarray(noise(*size))
    exif = image.getexif()
    exif[274] = turn
    image.save(tmp_path / "upload", "PNG", exif=exif)
    with Image.open(tmp_path / "upload") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(kept(tmp_path / "upload"), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_as_converting_it_whole(tmp_path, mode):
    image = Image.fromarray(noise(300, 70, 4), "RGBA").convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image.save(tmp_path / "upload", kind)
    with Image.open(tmp_path / "upload") as opened:
        whole = to_srgb(opened, "it").convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    np.testing.assert_array_equal(kept(tmp_path / "upload"), np.asarray(expected))


def test_profiles_are_heeded_and_large_images_in_strips(tmp_path):
    image = Image.fromarray(noise(700, 50))
    image.save(tmp_path / "upload", "PNG", icc_profile=srgb_profile())
    np.testing.assert_array_equal(kept(tmp_path / "upload"), np.asarray(image))


@slow
@pytest.mark.parametrize(
    ("kind", "size", "options", "words"),
    [
        ("PNG", (10_000, 10_000), {}, "at most 67 million"),
        ("WEBP", (6_000, 6_000), {"method": 0}, "GiB as a WEBP; send it as a PNG"),
        ("JPEG", (8_000, 8_000), {"progressive": True}, "as a progressive JPEG"),
    ],
)
def test_bombs_are_refused_by_their_header(tmp_path, monkeypatch, kind, size, options, words):
    mode = "1" if kind == "PNG" else "RGB"
    Image.new(mode, size).save(tmp_path / "upload", kind, **options)

    def decode(*args):
        raise AssertionError("its pixels were read")

    monkeypatch.setattr("clear_dit.app.uploads.load_unturned", decode)
    with pytest.raises(RequestError, match=words):
        keep_upload(tmp_path / "upload")


def scan_by_scan(side, channels):
    """A JPEG that is not progressive, each channel in a scan of its own; each block is 2 bits."""
    out = b"\xff\xd8\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1] * 64)
    out += b"\xff\xc0" + struct.pack(">HBHHB", 8 + 3 * channels, 8, side, side, channels)
    out += b"".join(bytes([channel, 0x11, 0]) for channel in range(channels))
    for table in (0, 0x10):
        out += b"\xff\xc4" + struct.pack(">HB", 20, table) + bytes([1, *[0] * 16])
    for channel in range(channels):
        out += b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([channel, 0, 0, 63, 0])
        out += bytes(side * side // 256)
    return out + b"\xff\xd9"


def many_pictures(side):
    file = io.BytesIO()
    first, second = Image.new("L", (side, side)), Image.new("L", (8, 8))
    first.save(file, "MPO", save_all=True, append_images=[second], progressive=True)
    return file.getvalue()


@pytest.mark.parametrize("make", [lambda s: scan_by_scan(s, 3), lambda s: scan_by_scan(s, 4),
                                  many_pictures])  # fmt: skip
def test_jpegs_that_are_held_by_their_coefficients_are_refused(tmp_path, monkeypatch, make):
    """640 MB at 8192 x 8192, whatever they are called; small ones are read."""
    (tmp_path / "upload").write_bytes(make(64))
    assert taken_in(tmp_path / "upload") == (64, 64)
    (tmp_path / "upload").write_bytes(make(64))
    monkeypatch.setattr("clear_dit.app.uploads.MAX_DECODE_BYTES", 5 * 64 * 64)
    with pytest.raises(RequestError, match="as a progressive JPEG"):
        taken_in(tmp_path / "upload")
    Image.fromarray(noise(64, 64)).save(tmp_path / "upload", "JPEG")
    assert taken_in(tmp_path / "upload") == (64, 64)


@pytest.mark.parametrize("data", [b"", b"%!PS-Adobe", b"GIF89a" + bytes(50), b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(tmp_path, data):
    (tmp_path / "upload").write_bytes(data)
    with pytest.raises(RequestError, match="The file"):
        keep_upload(tmp_path / "upload")


def test_a_cut_image_is_refused(tmp_path):
    Image.fromarray(noise(200, 200)).save(tmp_path / "upload", "PNG")
    (tmp_path / "upload").write_bytes((tmp_path / "upload").read_bytes()[:-500])
    with pytest.raises(RequestError, match="damaged or cut off"):
        keep_upload(tmp_path / "upload")


def overlapping(tags, size):
    """EXIF whose values all are the same bytes."""
    head = b"II*\0" + struct.pack("<IH", 8, tags)
    places = (struct.pack("<HHII", 1000 + tag, 7, size, 0) for tag in range(tags))
    return head + b"".join(places) + bytes(4 + size)


def in_png(kind, data, *, last=False):
    """A PNG with one more chunk, before its pixels or behind them."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    plain, at = file.getvalue(), -12 if last else 33
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return plain[:at] + chunk + plain[at:]


def in_jpeg(*segments):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    added = (struct.pack(">BBH", 255, kind, len(data) + 2) + data for kind, data in segments)
    return file.getvalue()[:2] + b"".join(added) + file.getvalue()[2:]


def in_webp(exif):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "WEBP", exif=exif)
    return file.getvalue()


def exif_bombs():
    bomb = overlapping(1500, 20_000)
    yield "png", in_png(b"eXIf", bomb)
    yield "png behind the pixels", in_png(b"eXIf", bomb, last=True)
    text = b"Raw profile type exif\0\nexif\n%d\n" % len(bomb) + bomb.hex().encode()
    yield "png as text", in_png(b"tEXt", text)
    yield "jpeg", in_jpeg((0xE1, b"Exif\0\0" + bomb))
    yield "jpeg with filler", in_jpeg((0xE0, b""), (0xE1, b"Exif\0\0" + bomb))
    half = len(bomb) // 2
    parts = (0xE1, b"Exif\0\0" + bomb[:half]), (0xE1, b"Exif\0\0" + bomb[half:])
    yield "jpeg in two", in_jpeg(*parts)
    yield "jpeg of many pictures", in_jpeg((0xE2, b"MPF\0" + bomb))
    yield "webp", in_webp(b"Exif\0\0" + bomb)
    inner = struct.pack("<H", 900) + b"".join(
        struct.pack("<HHII", 1000 + tag, 7, 10_000, 0) for tag in range(900)
    )
    head = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x8769, 4, 1, 26, 0) + inner
    yield "in a list of a list", in_png(b"eXIf", head + bytes(10_000))
    yield "big tiff", in_png(b"eXIf", b"II+\0" + bomb[4:])


@pytest.mark.parametrize(("name", "data"), list(exif_bombs()))
def test_exif_takes_no_more_memory_than_the_file(tmp_path, name, data):
    """30 MB of values from some 40 KB."""
    (tmp_path / "upload").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(RequestError, match="more EXIF data than any camera"):
        taken_in(tmp_path / "upload")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_exif_of_cameras_passes(tmp_path):
    image = Image.fromarray(noise(37, 31))
    exif = image.getexif()
    exif[274], exif[271], exif[270] = 6, "Maker", "d" * 30_000
    exif.get_ifd(0x8769).update({0x9000: b"0232", 0x829A: (1, 200)})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    for kind in ("PNG", "JPEG", "WEBP"):
        image.save(tmp_path / "upload", kind, exif=exif)
        assert taken_in(tmp_path / "upload") == (37, 31)
