"""The seam metric: sees a step at a border, and nothing where there is none."""

import json

import numpy as np
import pytest
from PIL import Image
from support.command_line import run

from clear_dit.evaluation.seams import gradient_profiles, measure_seams, seams_of_file


def make_image(height=384, width=320, seed=0):
    """Coarse shapes and grain, as uint8 (height, width, 3), with a pattern of 8 pixels on top."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 210, (7, 9, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    pattern = 3 * (np.arange(height)[:, None, None] % 8 == 0)
    return np.clip(smooth + rng.normal(0, 2, smooth.shape) + pattern, 0, 255).astype(np.uint8)


def with_tone_step(image, tile, levels=2):
    """Every other tile lighter by some grey levels, like tiles with a tone of their own."""
    y, x = np.indices(image.shape[:2]) // tile
    return np.clip(image.astype(int) + levels * ((y + x) % 2)[..., None], 0, 255)


@pytest.mark.parametrize("seed", range(5))
def test_a_step_of_two_grey_levels_is_seen(seed):
    image = make_image(seed=seed)
    borders = [128, 256]
    none = measure_seams(image, borders, borders)
    seen = measure_seams(with_tone_step(image, 128), borders, borders)
    assert none.ratio == pytest.approx(1, abs=0.04)
    assert seen.ratio > max(1.05, none.ratio + 0.08)
    assert seen.rows > none.rows + 0.05
    assert seen.columns > none.columns + 0.05


def test_without_grain_a_step_stands_out_and_flatness_is_one():
    flat = np.full((128, 128, 3), 100, np.uint8)
    assert measure_seams(flat, [64], [64]).ratio == 1
    assert measure_seams(with_tone_step(flat, 64, 1), [64], [64]).ratio > 50


def test_one_bad_border_is_named():
    image = make_image().astype(int)
    image[:, 256:] += 6
    found = measure_seams(image, [128, 256], [64, 128, 192, 256])
    assert found.worst_at == ("column", 256)
    assert found.worst > 1.5 > found.ratio > 1.05
    assert found.rows == pytest.approx(1, abs=0.04)


def test_profiles_of_strips_are_those_of_the_whole():
    image = make_image(50, 40)
    rows, columns = gradient_profiles([image[:7], image[7:8], image[8:]])
    values = image.astype(float)
    assert rows[0] == columns[0] == 0
    assert rows[1:] == pytest.approx(np.abs(np.diff(values, axis=0)).mean(axis=(1, 2)), rel=1e-5)
    assert columns[1:] == pytest.approx(np.abs(np.diff(values, axis=1)).mean(axis=(0, 2)), rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], [], "there is no border"),
        ([0], [], "must be a row from 1 to 383, got 0"),
        ([], [320], "must be a column from 1 to 319, got 320"),
        (range(8, 384, 8), [], "row 8 has no line beside it"),
    ],
)
def test_impossible_borders_are_refused(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        measure_seams(make_image(), rows, columns)


def test_the_command_prints_the_metric(tmp_path, capsys):
    path = tmp_path / "image.png"
    Image.fromarray(with_tone_step(make_image(), 128).astype(np.uint8)).save(path)
    assert run("evaluate", "seams", path, "--tile", 128, "--json") == 0
    text, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    assert result["ratio"] > 1.05
    assert f"seam metric {result['ratio']:.3f} at tiles of 128 px" in text
    assert (result["height"], result["width"], result["tile"]) == (384, 320, 128)


def test_an_image_of_any_mode_and_beyond_pillows_own_bound(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    Image.fromarray(make_image()).convert("RGBA").save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert seams_of_file(path, 128)["ratio"] == pytest.approx(1, abs=0.04)
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("missing.png", (), "missing.png cannot be read (No such file"),
        (".", (), "cannot be read (Is a directory)"),
        ("text.png", (), "text.png is not an image"),
        ("cut.png", (), "cut.png is damaged or cut off"),
        ("huge.png", (), "20000 x 8 pixels; at most 16384 a side"),
        ("good.png", ("--tile", 15), "--tile must be from 16 to 383 pixels"),
        ("good.png", ("--tile", 384), "(320 x 384), got 384"),
        ("good.png", (), "got 1024"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, name, options, message):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(make_image()).save("good.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:90000])
    Image.new("L", (20000, 8)).save("huge.png")
    tile = ("--tile", 128) if name != "good.png" else options
    assert run("evaluate", "seams", name, *tile) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]


def test_options_of_evaluate_are_not_silently_ignored(tmp_path, capsys):
    assert run("evaluate", "--count", 3, "seams", tmp_path / "image.png") == 2
    assert "--count does not go with seams" in capsys.readouterr().err
