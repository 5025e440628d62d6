"""The pyramid holds the image's pixels, at every size."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from clear_dit.app.tiles import TILE, write_tiles
from clear_dit.pipelines.decoding.colours import srgb_profile
from clear_dit.pipelines.decoding.image_files import save_rows


def save(path, height, width):
    """A smooth image, which JPEG keeps."""
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None, :]
    pixels = torch.stack([y.expand(height, width), x.expand(height, width), (x * y)])
    save_rows(pixels.split(100, dim=1), path, height=height, width=width, settings={})


@pytest.mark.parametrize(("height", "width"), [(1, 1), (512, 512), (513, 1025), (700, 333)])
def test_every_level_is_the_image_halved(tmp_path, height, width):
    save(tmp_path / "a.png", height, width)
    top = write_tiles(tmp_path / "a.png", tmp_path / "tiles")
    assert 2**top >= max(height, width) > 2**top / 2 - 1
    with Image.open(tmp_path / "a.png") as image:
        whole = np.asarray(image).astype(int)
    for level in range(top + 1):
        rows = -(-height // 2 ** (top - level))
        columns = -(-width // 2 ** (top - level))
        found = np.full((rows, columns, 3), -1)
        for path in (tmp_path / "tiles" / str(level)).iterdir():
            column, row = map(int, path.stem.split("_"))
            with Image.open(path) as tile:
                assert max(tile.size) <= TILE
                assert tile.info["icc_profile"] == srgb_profile()
                pixels = np.asarray(tile)
            y, x = row * TILE, column * TILE
            found[y : y + len(pixels), x : x + pixels.shape[1]] = pixels
        assert (found >= 0).all(), "a tile is missing"
        if level == top:
            assert np.abs(found - whole).max() < 12
        elif level >= top - 3 and min(rows, columns) > 8:
            with Image.open(tmp_path / "a.png") as image:
                expected = np.asarray(image.resize((columns, rows), Image.Resampling.BOX))
            assert np.abs(found - expected).mean() < 4


def test_the_thumbnail_is_one_tile(tmp_path):
    save(tmp_path / "a.png", 700, 1400)
    write_tiles(tmp_path / "a.png", tmp_path / "tiles")
    whole = tmp_path / "tiles" / str(TILE.bit_length() - 1)
    assert [path.name for path in whole.iterdir()] == ["0_0.jpg"]


def test_memory_does_not_grow_with_the_image(tmp_path):
    peaks = []
    for height in (4096, 8192):
        save(tmp_path / "a.png", height, 512)
        tracemalloc.start()
        write_tiles(tmp_path / "a.png", tmp_path / str(height))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_other_pngs_are_refused(tmp_path):
    for mode, size in (("L", (8, 8)), ("RGB", (64, 64))):
        Image.effect_noise((64, 64), 80).resize(size).convert(mode).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"write_tiles: must be a PNG"):
            write_tiles(tmp_path / "a.png", tmp_path / mode)
