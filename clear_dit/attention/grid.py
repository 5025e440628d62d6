"""Where the image is in a sequence of tokens: text, rows and columns, reference images.

diffusers gives an attention processor neither. Both follow from what it does give: the position ids
that enter the transformer, or the rotary table made from them. Either way a token is a row of
numbers, and an image is a raster: the numbers that belong to the column repeat in every row of
tokens, the others are the same along it, and both advance evenly. All of that is checked; whatever
is not such a raster is refused. Reference images (FLUX.1-Kontext) follow the image and differ
from it in the first number, the group.
"""

from __future__ import annotations

import math

import torch

from .layout import Layout

REMEDY = "Name the grid yourself: grid=(rows, columns)."


def layout_from_ids(txt_ids: torch.Tensor, img_ids: torch.Tensor) -> Layout:
    """The layout that FLUX position ids describe.

    Args:
        txt_ids: (text, 3); only the length is used. Of a leading batch dimension the first entry
            is taken, as diffusers does.
        img_ids: (image, 3): group, row and column of every image token, in any dtype; FLUX.2's have
            a fourth number, always 0. Ids rounded to bfloat16, which merges neighbours above 256,
            are recognised. Tokens of other groups behind the image are those of reference images,
            of any number and size.

    Raises:
        ValueError: the image's ids are not one raster.
    """
    txt_ids = txt_ids[0] if txt_ids.ndim == 3 else txt_ids
    img_ids = img_ids[0] if img_ids.ndim == 3 else img_ids
    image_length = _image_length(img_ids[:, 0])
    grid = find_grid(img_ids[:image_length].float())
    return Layout(len(txt_ids), *grid, reference_length=len(img_ids) - image_length)


def unrounded_ids(img_ids: torch.Tensor, layout: Layout) -> torch.Tensor | None:
    """Position ids in float32, where a half-precision dtype has merged neighbours.

    Stock pipelines make the ids in the default dtype and cast them to the prompt's; bfloat16 cannot
    tell integers above 256 apart, which is a side of 4096 pixels. Only ids that are exactly the
    rounded raster of `layout`, from 0 on in steps of any size, are replaced; those of reference
    images stay as they are.

    Returns:
        (image, 3 or 4), float32; None where nothing was lost, or the ids are not that raster.

    Raises:
        ValueError: torch.export hides ids in a half-precision dtype.
    """
    if img_ids.is_meta or max(layout.rows, layout.columns) <= 256:  # bfloat16 has all of these
        return None
    if torch.compiler.is_exporting():  # there are no values
        if img_ids.dtype.itemsize < 4:
            raise ValueError(
                f"CLEAR: img_ids in {img_ids.dtype} cannot tell the {layout.rows} x "
                f"{layout.columns} tokens of the image apart; export with them in float32."
            )
        return None
    size = layout.rows, layout.columns, img_ids.shape[-1]
    exact = torch.zeros(size, dtype=torch.float32, device=img_ids.device)
    received = (img_ids[0] if img_ids.ndim == 3 else img_ids).float()
    # What comes first is not rounded: with a single line of tokens one of these is not used.
    row, column = received[layout.columns % len(received), 1], received[1 % len(received), 2]
    exact[..., 1] = row * torch.arange(layout.rows, device=img_ids.device)[:, None]
    exact[..., 2] = column * torch.arange(layout.columns, device=img_ids.device)
    exact = exact.flatten(0, 1)
    received, references = received[: len(exact)], received[len(exact) :]
    if torch.equal(received, exact):
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(received, exact.to(dtype).float()):
            return torch.cat([exact, references])
    return None


def layout_from_rotary(
    cos: torch.Tensor,
    sin: torch.Tensor,
    text_length: int | None = None,
    local_references: bool = False,
) -> Layout:
    """The layout that a rotary table describes.

    Args:
        cos, sin: (text + image, channels), text first, every angle in two neighbouring channels,
            the group's first.
        text_length: number of text tokens, where it is known. Otherwise it is inferred: text tokens
            all have one position, and the image's first token may have the same one.
        local_references: whether the layout shall have the grids of reference images.

    Raises:
        ValueError: the image's tokens are not one raster, or the text length is ambiguous; see
            also `reference_grids`.
    """
    angles = torch.atan2(sin[:, ::2].float(), cos[:, ::2].float())
    before = text_length or 0
    first_group = before + _image_length(angles[before:, 0])
    layout = _layout_from_angles(angles[:first_group], text_length)
    references = len(angles) - first_group
    if references and layout.rows == 1:
        # What is taken for the group could as well be the row, in a table without groups.
        raise ValueError(
            f"CLEAR: cannot tell {references} tokens of reference images from further rows of a "
            f"image of {layout.columns} columns. Use apply_clear, which reads the position ids."
        )
    layout = layout._replace(reference_length=references)
    if local_references:
        grids = reference_grids(angles[first_group:], period=2 * math.pi)
        layout = layout._replace(local_references=grids)
    return layout


def _layout_from_angles(angles: torch.Tensor, text_length: int | None) -> Layout:
    """`layout_from_rotary` without reference images; angles: (text + image, channels / 2)."""
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
            f"CLEAR: cannot tell text from image in {len(angles)} tokens ({leading} leading "
            f"tokens have the same position). {REMEDY}"
        )
    return found[0]


def reference_grids(
    positions: torch.Tensor, period: float | None = None
) -> tuple[tuple[int, int], ...]:
    """Rows and columns of every reference image.

    One begins where the group is another one, and where the first position of a group comes again.
    So images of one group that continue one another's rows count as one; and positions beyond 256
    in bfloat16, which repeat, are told wrongly.

    Args:
        positions: (tokens, channels), float: what marks the place of each token of reference
            images, the group first.
        period: as in `find_grid`.

    Raises:
        ValueError: the tokens of an image are not one raster.
    """
    group, grids = positions[:, 0], []
    changes = (group[1:] != group[:-1]).nonzero().flatten() + 1
    for tokens in positions.tensor_split(changes.cpu()):
        again = (tokens[1:] == tokens[:1]).all(dim=1).nonzero().flatten() + 1
        for image in tokens.tensor_split(again.cpu()):
            try:
                grids += [find_grid(image, period)] if len(image) else []
            except ValueError:
                raise ValueError(
                    f"CLEAR: {len(image)} tokens of a reference image are not in raster order, so "
                    "that it has no disc within itself; use references='dense'."
                ) from None
    return tuple(grids)


def _image_length(group: torch.Tensor) -> int:
    """Number of leading tokens in the first token's group; behind them it must not come again."""
    other = group != group[:1]
    length = int(other.int().argmax()) if other.any() else len(other)
    if not other[length:].all():
        raise ValueError(
            "CLEAR: the tokens of the image do not come first, those of reference images after "
            "them, as in FLUX.1-Kontext."
        )
    return length


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
        f"CLEAR: the positions of the {tokens} image tokens are not those of one image in raster "
        f"order (reference images must differ in the first id, as in FLUX.1-Kontext). {REMEDY}"
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
