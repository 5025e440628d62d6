"""Images written strip by strip: the same pixels, the settings inside, whole or not at all."""

import errno

import numpy as np
import pytest
import tifffile
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from clear_dit.files import check_writable
from clear_dit.generation.image_output import read_settings
from clear_dit.pipelines.decoding.image_files import IMAGE_SUFFIXES, save_rows, to_bytes

SETTINGS = {"prompt": "ein Häuschen am Meer, 海", "seed": 7, "sizes": [1, 2]}


def make_image(height, width, channels=3):
    """Beyond [-1, 1] too."""
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(0))


def save(image, path, rows=7, **changes):
    size = {"height": image.shape[1], "width": image.shape[2]}
    return save_rows(image.split(rows, dim=1), path, settings=SETTINGS, **{**size, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_diffusers(dtype):
    image = torch.linspace(-1.2, 1.2, 30000).reshape(3, 100, 100).to(dtype)
    (expected,) = VaeImageProcessor().postprocess(image[None], output_type="pil")
    assert np.array_equal(to_bytes(image).permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("suffix", [*IMAGE_SUFFIXES, ".PNG"])
@pytest.mark.parametrize("size", [(1, 1), (30, 17), (300, 530)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pixels_and_settings_come_back(tmp_path, suffix, size, mode):
    path, image = tmp_path / f"image{suffix}", make_image(*size, len(mode))
    check_writable(path, IMAGE_SUFFIXES)
    save(image, path)
    with Image.open(path) as opened:
        assert opened.mode == mode
        found = np.array(opened)
    assert np.array_equal(found, to_bytes(image).permute(1, 2, 0).numpy())
    assert read_settings(path) == SETTINGS
    assert list(tmp_path.iterdir()) == [path]


def test_a_tiff_is_compressed_and_becomes_a_big_one_when_needed(tmp_path, monkeypatch):
    path = tmp_path / "image.tif"
    for big in (False, True):
        if big:
            monkeypatch.setattr("clear_dit.pipelines.decoding.image_files._CLASSIC_TIFF", 1000)
        save(torch.zeros(3, 300, 400), path)
        with tifffile.TiffFile(path) as tiff:
            assert tiff.is_bigtiff == big
        assert path.stat().st_size < 300 * 400 * 3 / 20


def test_a_description_by_another_program_is_no_setting(tmp_path):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, np.zeros((4, 4, 3), np.uint8), description="a holiday")
    assert read_settings(path) == {}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_what_fails_leaves_nothing_behind(tmp_path, suffix):
    path, image = tmp_path / f"image{suffix}", make_image(20, 9)
    save(image, path)
    kept = path.read_bytes()

    def full():
        yield image[:, :10]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_rows(full(), path, height=20, width=9, settings={})
    for changes in ({"height": 19}, {"height": 21}, {"width": 8}):
        with pytest.raises(ValueError, match="must add up to"):
            save(image, path, **changes)
    strips = [torch.zeros(4, 10, 9), image[:, 10:]]
    with pytest.raises(
        ValueError, match=r"of \(4, rows, 9\) must add up to 20 rows; .* \(3, 10, 9\)"
    ):
        save_rows(strips, path, height=20, width=9, settings={})
    with pytest.raises(ValueError, match="not finite"):
        save(image * float("nan"), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == kept


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_name_that_is_taken(tmp_path, suffix):
    path, images = tmp_path / f"image{suffix}", [make_image(20, 9) / scale for scale in (1, 2, 4)]
    assert save(images[0], path) == path
    other = save(images[1], path, overwrite=False)
    assert other == tmp_path / f"image-2{suffix}"
    assert save(images[2], path) == path
    for image, name in ((images[2], path), (images[1], other)):
        with Image.open(name) as opened:
            assert np.array_equal(opened, to_bytes(image).permute(1, 2, 0))


def test_a_smooth_png_is_small(tmp_path):
    ramp = torch.linspace(-1, 1, 256)
    image = (ramp[:, None] + ramp).expand(3, 256, 256) / 2
    save(image, tmp_path / "ours.png", rows=100)
    (opened,) = VaeImageProcessor().postprocess(image[None], output_type="pil")
    opened.save(tmp_path / "pillows.png")
    sizes = [(tmp_path / f"{name}.png").stat().st_size for name in ("ours", "pillows")]
    assert sizes[0] < 1.5 * sizes[1]


def test_other_formats_are_refused_before_anything_is_decoded(tmp_path):
    with pytest.raises(ValueError, match=r"must be \.png, \.tif, \.tiff, got .*image\.jpg"):
        save_rows(iter([]), tmp_path / "image.jpg", height=1, width=1, settings={})
    with pytest.raises(ValueError, match=r"must end in \.png or \.tif or \.tiff"):
        check_writable(tmp_path / "image.jpg", IMAGE_SUFFIXES)
