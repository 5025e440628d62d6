"""What a file says besides pixels: profiles, opacity, depth, animation, and its kind."""

import io
import os
import struct
import sys
import threading
import warnings
from contextlib import suppress

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile, PngImagePlugin
from support import icc

from clear_dit.app.uploads import keep_upload
from clear_dit.errors import RequestError
from clear_dit.generation.image_input import open_image, read_image
from clear_dit.generation.image_output import read_settings, save_png
from clear_dit.pipelines.cascade.given_image import pixels_from
from clear_dit.pipelines.decoding.image_files import save_rows

VALUES = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
IMAGE = Image.fromarray(VALUES)
GREY = Image.fromarray(VALUES[..., 0])
# Of a transform in 8 bits.
LEVELS = 2


def refusal(path):
    with pytest.raises(RequestError) as told:
        read_image(path)
    assert "\n" not in str(told.value)
    assert str(path) in str(told.value)
    return str(told.value)


def far_from(image, expected):
    """By how many levels the worst pixel is off."""
    return np.abs(np.asarray(image, dtype=float) - expected).max()


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_a_wide_gamut_photo_keeps_its_saturation(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    IMAGE.save(path, icc_profile=icc.rgb_profile(), lossless=True)
    expected = icc.srgb_of(VALUES)
    assert np.abs(expected - VALUES).max() > 50
    assert far_from(read_image(path), expected) <= LEVELS
    assert "icc_profile" not in read_image(path).info
    if suffix != "tif":  # which the page does not take
        keep_upload(path)
        assert far_from(read_image(path), expected) <= LEVELS


def test_images_of_pil_have_their_profiles_applied_too():
    image = IMAGE.copy()
    image.info["icc_profile"] = icc.rgb_profile()
    (found,) = pixels_from(image, 16)
    assert far_from((found[0].permute(1, 2, 0) + 1) * 127.5, icc.srgb_of(VALUES)) <= LEVELS
    assert image.info["icc_profile"] == icc.rgb_profile()


def test_a_cut_image_of_pil_is_not_called_a_broken_profile(caplog):
    file = io.BytesIO()
    IMAGE.save(file, "JPEG", icc_profile=icc.rgb_profile())
    image = Image.open(io.BytesIO(file.getvalue()[:3000]))
    with pytest.raises(OSError, match="truncated"):
        pixels_from(image, 16)
    assert not caplog.text


def test_grey_and_palettes_have_profiles_too(tmp_path):
    GREY.save(tmp_path / "grey.png", icc_profile=icc.grey_profile(1.5))
    light = icc.encoded((VALUES[..., :1] / 255) ** 1.5)
    assert np.abs(light - VALUES[..., :1]).max() > 15
    assert far_from(read_image(tmp_path / "grey.png"), light) <= LEVELS
    # An RGB profile on a grey image says how light its values are.
    GREY.save(tmp_path / "tagged.png", icc_profile=icc.rgb_profile(gamma=1.5))
    assert far_from(read_image(tmp_path / "tagged.png"), light) <= LEVELS
    palette = IMAGE.quantize(16)
    palette.save(tmp_path / "palette.png", icc_profile=icc.rgb_profile())
    expected = icc.srgb_of(np.asarray(palette.convert("RGB")))
    assert far_from(read_image(tmp_path / "palette.png"), expected) <= LEVELS


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_is_what_its_profile_says(tmp_path, suffix):
    path = tmp_path / f"print.{suffix}"
    lab = (50, -20, -30)
    Image.new("CMYK", (64, 64), (255, 0, 0, 0)).save(path, icc_profile=icc.cmyk_profile(lab))
    assert far_from(read_image(path), icc.srgb_of_lab(lab)) <= 3
    Image.new("CMYK", (64, 64), (255, 0, 0, 0)).save(path)
    assert far_from(read_image(path), (0, 255, 255)) <= 3


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        (b"no profile", "is broken"),
        (icc.rgb_profile()[:200], "is broken"),
        (icc.cmyk_profile((50, 0, 0)), "is for CMYK and the image is RGB"),
        (icc.grey_profile(1.0), "is for GRAY and the image is RGB"),
    ],
)
def test_a_profile_that_cannot_be_is_left_out_with_a_warning(tmp_path, caplog, profile, told):
    path = tmp_path / "a.png"
    IMAGE.save(path, icc_profile=profile)
    assert far_from(read_image(path), VALUES) == 0
    assert str(path) in caplog.text
    assert told in caplog.text


P3 = icc.srgb_of_xyz(icc.linear(VALUES) @ icc.DISPLAY_P3.T)
ADOBE_POINTS = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
SRGB_POINTS = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


def big(*numbers):
    return struct.pack(f">{len(numbers)}I", *numbers)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ({b"gAMA": big(100_000)}, icc.encoded(VALUES / 255)),
        (
            {b"gAMA": big(45_470), b"cHRM": big(*ADOBE_POINTS)},
            icc.srgb_of(VALUES),
        ),
        ({b"gAMA": big(45_455), b"cHRM": big(*SRGB_POINTS)}, VALUES),
        ({b"gAMA": big(100_000), b"sRGB": b"\0"}, VALUES),
        ({b"gAMA": big(0)}, VALUES),
        ({b"cHRM": big(*[0] * 8)}, VALUES),
        ({b"cICP": bytes([12, 13, 0, 1])}, P3),
        ({b"cICP": bytes([1, 8, 0, 1])}, icc.encoded(VALUES / 255)),
        ({b"cICP": bytes([1, 13, 0, 1]), b"gAMA": big(100_000)}, VALUES),
    ],
)
def test_colours_of_png_without_a_profile(tmp_path, chunks, expected):
    info = PngImagePlugin.PngInfo()
    for name, data in chunks.items():
        info.add(name, data)
    IMAGE.save(tmp_path / "a.png", pnginfo=info)
    exactly = expected is VALUES
    assert far_from(read_image(tmp_path / "a.png"), expected) <= (0 if exactly else LEVELS)
    keep_upload(tmp_path / "a.png")
    assert far_from(read_image(tmp_path / "a.png"), expected) <= (0 if exactly else LEVELS)


@pytest.mark.parametrize("suffix", ["avif", "heic"])
def test_colours_of_video_in_images(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    plain = Image.fromarray(VALUES[::16, ::16]).resize((96, 64), Image.Resampling.NEAREST)
    if suffix == "heic":
        heif = pytest.importorskip("pillow_heif", reason="pip install 'clear-dit[heif]'")
        heif.from_pillow(plain).save(path, quality=-1, chroma=444)
    else:
        plain.save(path, quality=100, subsampling="4:4:4")
    data = path.read_bytes()
    at = data.index(b"colrnclx") + 8
    expected = icc.srgb_of_xyz(icc.linear(np.asarray(read_image(path))) @ icc.DISPLAY_P3.T)
    path.write_bytes(data[:at] + struct.pack(">HH", 12, 13) + data[at + 4 :])
    assert far_from(read_image(path), expected) <= LEVELS
    for curve, name in ((16, "PQ"), (18, "HLG")):
        path.write_bytes(data[:at] + struct.pack(">HH", 9, curve) + data[at + 4 :])
        assert f"is an HDR image ({name})" in refusal(path)


@pytest.mark.parametrize("turned", [1, 6])
def test_cameras_mark_adobe_rgb_in_exif(tmp_path, turned):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    exif[ExifTags.IFD.Exif] = {
        ExifTags.Base.ColorSpace: 0xFFFF,
        ExifTags.IFD.Interop: {ExifTags.Interop.InteropIndex: "R03"},
    }
    IMAGE.save(tmp_path / "a.png", exif=exif)
    values = VALUES if turned == 1 else np.rot90(VALUES, -1)
    assert far_from(read_image(tmp_path / "a.png"), icc.srgb_of(values)) <= LEVELS


def test_jpeg_2000_has_its_profile_in_a_box(tmp_path):
    IMAGE.save(tmp_path / "a.jp2")
    data = (tmp_path / "a.jp2").read_bytes()
    assert far_from(read_image(tmp_path / "a.jp2"), VALUES) == 0
    header, at = data.index(b"jp2h") - 4, data.index(b"colr") - 4
    profile = b"colr" + bytes([2, 0, 0]) + icc.rgb_profile()
    after = at + int.from_bytes(data[at : at + 4])
    parts = [data[:at], big(len(profile) + 4), profile, data[after:]]
    longer = int.from_bytes(data[header : header + 4]) + len(profile) + 4 - (after - at)
    parts[0] = parts[0][:header] + big(longer) + parts[0][header + 4 :]
    (tmp_path / "a.jp2").write_bytes(b"".join(parts))
    assert far_from(read_image(tmp_path / "a.jp2"), icc.srgb_of(VALUES)) <= LEVELS


def test_what_is_written_says_srgb_and_is_read_bit_for_bit(tmp_path):
    png, tiff, other = tmp_path / "a.png", tmp_path / "a.tif", tmp_path / "b.png"
    rows = torch.from_numpy(VALUES).permute(2, 0, 1) / 127.5 - 1
    for path in (png, tiff):
        save_rows([rows], path, height=64, width=96, settings={"seed": 1})
        assert read_settings(path) == {"seed": 1}
        assert far_from(read_image(path), VALUES) == 0
    save_png(IMAGE, other, {})
    for path in (png, other):
        with Image.open(path) as image:
            assert image.info["srgb"] == 0
    with Image.open(tiff) as image, tifffile.TiffFile(tiff) as file:
        profile = image.info["icc_profile"]
        assert file.pages[0].iccprofile == profile
    found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    assert "sRGB" in ImageCms.getProfileDescription(found)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_everywhere_is_taken_and_a_single_clear_pixel_refused(tmp_path, mode):
    path, image = tmp_path / "a.png", IMAGE.convert(mode)
    image.save(path)
    assert far_from(read_image(path), np.asarray(image.convert("RGB"))) == 0
    image.putpixel((77, 5), (*image.getpixel((77, 5))[:-1], 254))
    image.save(path)
    assert f"has an alpha channel (mode {mode})" in refusal(path)
    with pytest.raises(ValueError, match="image has an alpha channel"):
        pixels_from(image, 16)


@pytest.mark.parametrize("used", [False, True])
def test_a_palette_with_a_clear_colour_is_refused_where_a_pixel_has_it(tmp_path, used):
    values = np.arange(64 * 96).reshape(64, 96).astype(np.uint8) % 8
    image = Image.fromarray(values, "P")
    image.putpalette(VALUES[0, :9].ravel().tolist())
    for transparency in (0 if used else 8, bytes([*[255] * 5, 9 if used else 255])):
        image.save(tmp_path / "a.png", transparency=transparency)
        if used:
            assert "has an alpha channel (mode P)" in refusal(tmp_path / "a.png")
        else:
            assert far_from(read_image(tmp_path / "a.png"), VALUES[0, values]) == 0


def test_a_clear_colour_of_an_image_without_a_palette(tmp_path):
    IMAGE.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert far_from(read_image(tmp_path / "a.png"), VALUES) == 0
    IMAGE.save(tmp_path / "a.png", transparency=tuple(VALUES[3, 3].tolist()))
    assert "has an alpha channel (mode RGB)" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "avif"])
def test_several_images_are_refused_and_one_is_taken(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    IMAGE.save(path, save_all=True, append_images=[IMAGE.rotate(180)], duration=100)
    assert "holds several images" in refusal(path)
    IMAGE.save(path)
    assert far_from(read_image(path), VALUES) < 255


def test_the_first_picture_of_a_phone_and_of_a_pyramid(tmp_path):
    IMAGE.save(tmp_path / "a.jpg", quality=95)
    IMAGE.save(
        tmp_path / "mpo.jpg", "MPO", save_all=True, append_images=[IMAGE.rotate(180)], quality=95
    )
    first = np.asarray(read_image(tmp_path / "a.jpg"), dtype=float)
    assert far_from(read_image(tmp_path / "mpo.jpg"), first) == 0
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(VALUES, photometric="rgb")
        file.write(VALUES[::2, ::2], photometric="rgb", subfiletype=1)
    assert far_from(read_image(tmp_path / "a.tif"), VALUES) == 0


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_sixteen_bits_in_colour_are_right_to_a_level(tmp_path, order, compression):
    deep = np.random.default_rng(0).integers(0, 65536, (64, 96, 3)).astype(f"{order}u2")
    options = {"photometric": "rgb", "byteorder": order, "compression": compression}
    tifffile.imwrite(tmp_path / "a.tif", deep, **options)
    assert far_from(read_image(tmp_path / "a.tif"), deep / 257) < 1
    planes = deep.transpose(2, 0, 1).copy()
    tifffile.imwrite(tmp_path / "a.tif", planes, planarconfig="separate", **options)
    assert "over 8 bits a channel with its channels apart" in refusal(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (VALUES[..., 0].astype(np.float32) / 255, "more than 8 bits a channel (mode F)"),
        (VALUES[..., 0].astype(np.uint16) * 257, "more than 8 bits a channel (mode I;16)"),
        (VALUES[..., 0].astype(np.int32), "more than 8 bits a channel (mode I)"),
        (VALUES.astype(np.float32) / 255, "of the kind TIFF"),
        (VALUES.astype(np.float16) / 255, "of the kind TIFF"),
    ],
)
def test_depths_without_a_white_are_refused_by_name(tmp_path, values, told):
    photometric = "rgb" if values.ndim == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", values, photometric=photometric)
    assert told in refusal(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_other_modes_of_pil_become_rgb(mode):
    if mode == "LAB":
        profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        expected, levels = 96 + VALUES // 4, 4  # muted, for Lab in 8 bits is coarse
        image = ImageCms.profileToProfile(Image.fromarray(expected), *profiles, outputMode="LAB")
    else:
        image = IMAGE.convert(mode)
        expected, levels = np.asarray(image.convert("RGB"), dtype=float), 1e-3
    (found,) = pixels_from(image, 16)
    assert far_from((found[0].permute(1, 2, 0) + 1) * 127.5, expected) <= levels


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (b"\xff\x0a" + bytes(60), "of the kind JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60), "of the kind JPEG XL"),
        (b"\xef\xbb\xbf\n <svg xmlns=''/>", "of the kind SVG"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(60), "of the kind camera raw"),
        (b"\x76\x2f\x31\x01" + bytes(60), "of the kind OpenEXR"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "of the kind EPS"),
        (b"%PDF-1.7" + bytes(60), "of the kind PDF"),
        (b"\n<!DOCTYPE html>\n<html>", "of the kind HTML, a web page"),
        (b"PK\x03\x04" + bytes(60), "of the kind ZIP (Krita and OpenRaster are)"),
        (bytes(128) + b"DICM" + bytes(60), "of the kind DICOM"),
        (b"", "is not an image"),
        (b"hello", "is not an image"),
        (b"\x89PNG\r\n\x1a\n", "a.bin"),
    ],
)
def test_kinds_that_others_open_are_named(tmp_path, head, told):
    (tmp_path / "a.bin").write_bytes(head)
    assert told in refusal(tmp_path / "a.bin")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60)


@pytest.mark.parametrize("head", [HEIC, HEIC.replace(b"ftypheic", b"ftypmif1")])
def test_heic_without_its_package_is_refused_with_the_way_to_get_it(tmp_path, monkeypatch, head):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.jpg").write_bytes(head)
    assert "HEIC image, which pillow-heif reads: pip install 'clear-dit[heif]'" in refusal(
        tmp_path / "a.jpg"
    )
    with pytest.raises(RequestError, match="of the kind HEIC"):
        keep_upload(tmp_path / "a.jpg")


def test_heic_with_its_package_is_read_and_pillow_left_as_it_is(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="pip install 'clear-dit[heif]'")
    heif.from_pillow(IMAGE.resize((96, 64))).save(tmp_path / "a.heic", quality=-1)
    small = read_image(tmp_path / "a.heic")
    assert small.size == (96, 64)
    assert abs(np.asarray(small).mean() - VALUES.mean()) < 2
    assert "HEIF" not in Image.OPEN


def test_avif_is_read_or_the_package_named(tmp_path, monkeypatch):
    path = tmp_path / "a.avif"
    IMAGE.save(path, quality=100, subsampling="4:4:4")
    assert far_from(read_image(path), VALUES) < 40
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "of the kind AVIF, which is not read here in this variant, or damaged" in refusal(path)
    path.write_bytes(whole)
    with pytest.raises(RequestError, match="The file is of the kind AVIF, which is not read"):
        keep_upload(path)
    Image.init()
    monkeypatch.setitem(Image.OPEN, "AVIF", (None, lambda head: "built without it"))
    assert "AVIF image, which Pillow reads from 11.3 on" in refusal(tmp_path / "a.avif")


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_pillows_bounds_are_neither_used_nor_touched(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.{suffix}"
    IMAGE.save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    seen, stop = set(), threading.Event()

    def look():
        while not stop.is_set():
            seen.add(
                (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, len(warnings.filters))
            )

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(30):
        assert far_from(read_image(path), VALUES) == 0
    stop.set()
    looking.join()
    assert len(seen) == 1


def test_bent_exif_hides_no_image(tmp_path):
    IMAGE.save(tmp_path / "a.png", exif=b"junk")
    assert far_from(read_image(tmp_path / "a.png"), VALUES) == 0
    IMAGE.save(tmp_path / "a.jpg", exif=b"Exif\0\0junk", quality=100)
    assert read_image(tmp_path / "a.jpg").size == (96, 64)


def test_the_small_copy_in_a_raw_file_is_not_taken_for_it(tmp_path):
    small = VALUES[::2, ::2].copy()
    with tifffile.TiffWriter(tmp_path / "a.dng") as file:
        file.write(small, photometric="rgb", subfiletype=1, subifds=1)
        file.write(VALUES, photometric="rgb")
    assert "begins with a small copy of its image" in refusal(tmp_path / "a.dng")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(small, photometric="rgb", subfiletype=1)
        file.write(VALUES, photometric="rgb")
    assert "begins with a small copy of its image" in refusal(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "a.tif", VALUES, photometric="rgb", subfiletype=1)
    assert far_from(read_image(tmp_path / "a.tif"), VALUES) == 0


def test_paths_that_are_none(tmp_path):
    for path in (tmp_path, tmp_path / "a", tmp_path / "a\0b"):
        assert "cannot be read" in refusal(path)


def test_a_size_is_bounded_before_memory_is_taken(tmp_path):
    Image.new("1", (16385, 64)).save(tmp_path / "a.png")
    with pytest.raises(RequestError, match="16385 x 64 pixels; at most 16384 a side"):  # noqa: SIM117
        with open_image(tmp_path / "a.png"):
            pass


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_orientation_is_applied_with_the_profile(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.zeros((64, 96, 3), np.uint8) + np.uint8([200, 60, 60])
    values[:32] = 60, 200, 60
    image = Image.fromarray(values)
    image.save(tmp_path / f"a.{suffix}", exif=exif, icc_profile=icc.rgb_profile(), quality=100)
    found = read_image(tmp_path / f"a.{suffix}")
    assert found.size == (64, 96)
    error = np.asarray(found, dtype=float) - icc.srgb_of(np.rot90(values, -1))
    assert np.abs(error).mean() < LEVELS


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif", "bmp"])
def test_cut_and_bent_files_raise_nothing_else(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    IMAGE.save(path)
    whole, draw = path.read_bytes(), np.random.default_rng(1)
    for _ in range(40):
        data = bytearray(whole[: draw.integers(1, len(whole))])
        for at in draw.integers(0, len(data), 3):
            data[at] = draw.integers(0, 256)
        path.write_bytes(data)
        with suppress(RequestError):
            read_image(path)
    assert os.listdir(tmp_path) == [path.name]


def test_bent_avif_is_refused_as_others_are(tmp_path):
    IMAGE.save(tmp_path / "a.avif")
    data = (tmp_path / "a.avif").read_bytes()
    at = data.index(b"mdat") + 4
    (tmp_path / "a.avif").write_bytes(data[:at] + bytes(len(data) - at))
    assert "a.avif is damaged or cut off" in refusal(tmp_path / "a.avif")
