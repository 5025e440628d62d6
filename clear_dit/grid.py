"""Where the picture is in a sequence of tokens: text length, rows and columns.

diffusers gives an attention processor neither. Both follow from what it does give: the position ids
that enter the transformer, or the rotary table made from them. Either way a token is a row of
numbers, and a picture is a raster: the numbers that belong to the column repeat in every row of
tokens, the others are the same along it, and both advance evenly. All of that is checked; whatever
is not such a raster is refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

REMEDY = "Name the grid yourself with CLEARProcessor(grid=(rows, columns))."


class Layout(NamedTuple):
    """How a sequence is made up, in tokens: text first, then the picture in raster order."""

    text_length: int
    rows: int
    columns: int


def layout_from_ids(txt_ids: torch.Tensor, img_ids: torch.Tensor) -> Layout:
    """The layout that FLUX position ids describe.

    Args:
        txt_ids: (text, 3); only the length is used. Of a leading batch dimension the first entry
            is taken, as diffusers does.
        img_ids: (image, 3): group, row and column of every image token, in any dtype. Ids rounded
            to bfloat16, which merges neighbours above 256, are recognised.

    Raises:
        ValueError: the ids are not one raster.
    """
    txt_ids = txt_ids[0] if txt_ids.ndim == 3 else txt_ids
    img_ids = img_ids[0] if img_ids.ndim == 3 else img_ids
    if (img_ids[:, 0] != img_ids[0, 0]).any():
        raise ValueError(
            "CLEAR: img_ids name more than one picture (their first column is not constant): "
            "reference images, as in FLUX.1-Kontext, are not supported yet."
        )
    return Layout(len(txt_ids), *find_grid(img_ids.float()))


def layout_from_rotary(
    cos: torch.Tensor, sin: torch.Tensor, text_length: int | None = None
) -> Layout:
    """The layout that a rotary table describes.

    Args:
        cos, sin: (text + image, channels), text first, every angle in two neighbouring channels.
        text_length: number of text tokens, where it is known. Otherwise it is inferred: text tokens
            all have one position, and the picture's first token may have the same one.

    Raises:
        ValueError: the image tokens are not one raster, or the text length is ambiguous.
    """
    angles = torch.atan2(sin[:, ::2].float(), cos[:, ::2].float())
    if text_length is not None:
        return Layout(text_length, *find_grid(angles[text_length:], period=2 * math.pi))
    alike = (angles == angles[0]).all(dim=1)
    leading = len(angles) if alike.all() else int(alike.int().argmin())
    found = []
    for text in (leading - 1, leading):
        try:
            found.append(Layout(text, *find_grid(angles[text:], period=2 * math.pi)))
        except ValueError as error:
            reason = str(error)
    if not found:
        raise ValueError(reason)
    if len(found) == 2 or (leading == len(angles) > 1):
        raise ValueError(
            f"CLEAR: cannot tell text from picture in {len(angles)} tokens ({leading} leading "
            f"tokens have the same position). {REMEDY}"
        )
    return found[0]


def find_grid(positions: torch.Tensor, period: float | None = None) -> tuple[int, int]:
    """Rows and columns of a raster.

    A single line of tokens counts as one row: the disc is the same for 1 x N and N x 1.

    Args:
        positions: (tokens, channels), float: what marks the place of each image token.
        period: positions are equal modulo this; 2 pi for angles.

    Raises:
        ValueError: the positions are not those of one raster.
    """
    tokens = len(positions)
    if tokens == 0:
        raise ValueError("CLEAR: the sequence has no image tokens.")
    if tokens == 1:
        return 1, 1
    column = positions[1] != positions[0]  # [channels], those that tell columns apart
    back = (positions[1:, column] == positions[0, column]).all(dim=1)
    columns = int(back.int().argmax()) + 1 if back.any() else tokens
    if tokens % columns == 0:
        raster = positions.unflatten(0, (-1, columns))  # [rows, columns, channels]
        if (
            bool((raster[:, :, column] == raster[:1, :, column]).all())
            and bool((raster[:, :, ~column] == raster[:, :1, ~column]).all())
            and _advances_evenly(raster[0], period)
            and _advances_evenly(raster[:, 0], period)
        ):
            return tokens // columns, columns
    raise ValueError(
        f"CLEAR: the positions of the {tokens} image tokens are not those of one picture in raster "
        f"order (reference images, as in FLUX.1-Kontext, are not supported yet). {REMEDY}"
    )


def _advances_evenly(points: torch.Tensor, period: float | None) -> bool:
    """Whether point i is point 0 plus i equal steps, counted exactly or as bfloat16 counts."""
    if len(points) == 1:
        return True
    offset = (points - points[0]).double()
    step = offset[1] if period is None else _nearest(offset[1], period)
    size = step.abs().max()
    count = torch.arange(len(points), device=points.device)
    for steps in (count.double(), count.bfloat16().double()):
        error = offset - steps[:, None] * step
        if period is not None:
            error = _nearest(error, period)
        if bool((size > 0) & (error.abs().max() < 0.02 * size)):
            return True
    return False


def _nearest(offset: torch.Tensor, period: float) -> torch.Tensor:
    """The representative closest to zero."""
    return offset - period * torch.round(offset / period)
