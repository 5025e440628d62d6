import numpy as np
from PIL import Image, ImageFont

from clear_dit.evaluation.sheet import FONT_SIZE, LINE, MAX_LINES, TILE, contact_sheet, wrap


def flat(colour, size=(64, 64)):
    return Image.new("RGB", size, colour)


def test_every_image_is_in_its_place_and_labels_are_ink():
    columns = [
        ("full attention", [flat((255, 0, 0)), flat((0, 255, 0))]),
        ("CLEAR r=2, untuned", [flat((0, 0, 255)), flat((255, 255, 0))]),
    ]
    sheet = np.array(contact_sheet(columns, ["a house", "a tree"]), int)
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)):
        rows, across = np.nonzero((sheet == colour).all(-1))
        assert len(rows) == TILE * TILE
        assert np.ptp(rows) == np.ptp(across) == TILE - 1
    red, blue = (np.nonzero((sheet == c).all(-1)) for c in ((255, 0, 0), (0, 0, 255)))
    assert red[0].min() == blue[0].min()
    assert red[1].max() < blue[1].min()
    above = sheet[: red[0].min()]
    assert (above.sum(-1) < 200).sum() > 200


def test_wide_images_keep_their_shape():
    sheet = contact_sheet([("x", [flat((255, 0, 0), (512, 256))])], ["a"])
    red = np.nonzero((np.array(sheet) == (255, 0, 0)).all(-1))
    assert np.ptp(red[1]) + 1 == 2 * (np.ptp(red[0]) + 1) == TILE


def test_text_is_wrapped_and_cut_with_dots():
    font = ImageFont.load_default(FONT_SIZE)
    assert wrap("a house", font, 200) == ["a house"]
    lines = wrap("a word " * 40, font, 200)
    assert len(lines) == MAX_LINES
    assert lines[-1].endswith("...")
    assert all(font.getlength(line) <= 200 for line in lines)
    (cut,) = wrap("x" * 900, font, 200)
    assert font.getlength(cut) <= 200
    assert font.getbbox("Agjy")[3] <= LINE
