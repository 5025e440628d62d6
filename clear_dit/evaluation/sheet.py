"""The contact sheet: a column for each variant, a row for each prompt, both labelled."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

TILE, GAP, MARGIN = 256, 8, 16  # pixels
FONT_SIZE, LINE = 17, 23  # pixels
MAX_LINES = 3
MIN_WIDTH = 480  # of the sheet, so that a prompt finds room beside few columns
_INK, _PAPER = (24, 24, 24), (255, 255, 255)


def contact_sheet(
    columns: Sequence[tuple[str, Sequence[Image.Image]]], prompts: Sequence[str]
) -> Image.Image:
    """Images side by side.

    Args:
        columns: a label and one image for each prompt, all of one size.
        prompts: written above their rows; what is too long for MAX_LINES lines ends in dots.

    Returns:
        An RGB image with tiles whose longer side is TILE pixels.
    """
    font = ImageFont.load_default(FONT_SIZE)
    first = columns[0][1][0]
    scale = TILE / max(first.size)
    width, height = (max(1, round(side * scale)) for side in first.size)
    pitch = width + GAP
    inner = max(len(columns) * pitch - GAP, MIN_WIDTH)
    heads = [wrap(label, font, width) for label, _ in columns]
    texts = [wrap(prompt, font, inner) for prompt in prompts]
    head_height = LINE * max(map(len, heads)) + GAP
    tops, y = [], MARGIN + head_height
    for lines in texts:
        tops.append(y)
        y += LINE * len(lines) + height + 2 * GAP
    sheet = Image.new("RGB", (2 * MARGIN + inner, y - GAP + MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (lines, (_, images)) in enumerate(zip(heads, columns, strict=True)):
        x = MARGIN + column * pitch
        _write(draw, (x, MARGIN), lines, font)
        for top, text, image in zip(tops, texts, images, strict=True):
            tile = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(tile, (x, top + LINE * len(text)))
    for top, lines in zip(tops, texts, strict=True):
        _write(draw, (MARGIN, top), lines, font)
    return sheet


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, at most MAX_LINES; what is cut ends in dots."""
    lines, rest = [""], text.split()
    while rest:
        longer = f"{lines[-1]} {rest[0]}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            rest.pop(0)
        elif lines[-1] and len(lines) < MAX_LINES:
            lines.append("")
        else:
            # A word wider than a line, or no line left for what remains.
            kept = longer
            while kept and font.getlength(f"{kept}...") > width:
                kept = kept[:-1]
            return [*lines[:-1], f"{kept}..."]
    return lines


def _write(
    draw: ImageDraw.ImageDraw,
    position: tuple[int, int],
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x, y = position
    for row, line in enumerate(lines):
        draw.text((x, y + row * LINE), line, fill=_INK, font=font)
