"""Where the picture is in a sequence of tokens: text length, rows and columns.

diffusers gives an attention processor neither. Both follow from what it does give: the position ids
that enter the transformer, or the rotary table made from them. Either way a token is a row of
numbers, and a picture is a raster: the numbers that belong to the column repeat in every row of
tokens, the others are the same along it, and both advance evenly. All of that is checked; whatever
is not such a raster is refused.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .kernels.window import Window

REMEDY = "Name the grid yourself with CLEARProcessor(grid=(rows, columns))."

# Implementations that torch.compile does not look into.
CUSTOM_OPS = ("triton", "tiled")

# Windows kept per model: two passes of classifier-free guidance at a few resolutions.
WINDOWS_KEPT = 8


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


def unrounded_ids(img_ids: torch.Tensor, layout: Layout) -> torch.Tensor | None:
    """Position ids in float32, where a half-precision dtype has merged neighbours.

    Stock pipelines cast the ids to the prompt's dtype; bfloat16 cannot tell integers above 256
    apart, which is a side of 4096 pixels. Only ids that are exactly the rounded raster of `layout`
    are replaced.

    Returns:
        (image, 3), float32; None where nothing was lost, or the ids are not that raster.
    """
    if img_ids.dtype not in (torch.bfloat16, torch.float16):
        return None
    exact = torch.zeros(layout.rows, layout.columns, 3, device=img_ids.device)
    exact[..., 1] = torch.arange(layout.rows, device=img_ids.device)[:, None]
    exact[..., 2] = torch.arange(layout.columns, device=img_ids.device)
    exact = exact.reshape(-1, 3)
    rounded = exact.to(img_ids.dtype)
    received = img_ids[0] if img_ids.ndim == 3 else img_ids
    if torch.equal(rounded.float(), exact) or not torch.equal(rounded, received):
        return None
    return exact


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


class WindowTracker:
    """The window of the forward pass under way, shared by the layers it concerns.

    It learns the layout either from whoever sees the position ids (`announce`), or from the rotary
    table that every layer of one forward receives. Windows are remembered, so that what an
    implementation keeps on a `Window` serves all layers and steps; rotary tables are held by weak
    reference only.
    """

    def __init__(self, radius: int, down_factor: int) -> None:
        self.radius = radius
        self.down_factor = down_factor
        self._reset()

    def _reset(self) -> None:
        self.announced: Window | None = None
        self.impl = "auto"
        self._is_news = False
        self._windows: OrderedDict[Layout, Window] = OrderedDict()
        self._by_rotary = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, int]:
        return {"radius": self.radius, "down_factor": self.down_factor}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)
        self._reset()

    def window(self, layout: Layout) -> Window:
        """The window for a layout: always the same object while it is in use."""
        if layout not in self._windows:
            self._windows[layout] = Window(
                height=layout.rows,
                width=layout.columns,
                text_length=layout.text_length,
                radius=self.radius,
                down_factor=self.down_factor,
            )
        self._windows.move_to_end(layout)
        while len(self._windows) > WINDOWS_KEPT:
            self._windows.popitem(last=False)
        return self._windows[layout]

    def announce(self, layout: Layout, impl: str) -> None:
        """Tell the layout of the forward that begins now, and which implementation will run it."""
        self.announced = self.window(layout)
        self.impl = impl
        self._is_news = True
        self._sizes = torch.empty([size + 2 for size in layout], device="meta")

    def compiled_window(self) -> Window:
        """The window of the forward under way, for code that torch.compile traces.

        Implementations that are custom ops take its numbers as arguments. They are then read from
        the shape of a tensor: such numbers the compiler keeps symbolic (unless 0 or 1), and a new
        resolution does not compile the model again.
        """
        if self.announced is None:
            raise RuntimeError(
                "CLEARProcessor: under torch.compile the token grid must be known beforehand; use "
                "apply_clear instead of set_attn_processor."
            )
        if self.impl not in CUSTOM_OPS:
            return self.announced
        text, rows, columns = (size - 2 for size in self._sizes.shape)
        return Window(rows, columns, text, self.radius, self.down_factor)

    def find(self, rotary: tuple[torch.Tensor, torch.Tensor], text_length: int | None) -> Window:
        """The window of the forward that this rotary table belongs to.

        A table seen before keeps its window: gradient checkpointing runs a layer again when other
        forwards may have gone by.
        """
        cos, sin = rotary
        window = self._by_rotary.get(cos)
        if window is None:
            if self._is_news and self.announced is not None:
                window = self.announced
                self._is_news = False
            else:
                window = self.window(layout_from_rotary(cos, sin, text_length))
            self._by_rotary[cos] = window
        return window
