"""The window of the forward pass under way, for the layers that take part in it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .grid import Layout, layout_from_rotary
from .kernels.window import Window

# Implementations that torch.compile does not look into.
CUSTOM_OPS = ("triton", "tiled")

# Windows kept per model: two passes of classifier-free guidance at a few resolutions.
WINDOWS_KEPT = 8


class WindowTracker:
    """The layout of the forward pass under way, shared by the layers it concerns, and its window.

    It learns the layout either from whoever sees the position ids (`announce`), or from the rotary
    table that every layer of one forward receives. Windows are remembered, so that what an
    implementation keeps on a `Window` serves all layers and steps; rotary tables are held by weak
    reference only.

    Attributes:
        share: where several processes share the picture of the forward under way, a
            `pipelines.patch_attention.SharedPicture`; else None.
    """

    def __init__(self, radius: int, down_factor: int) -> None:
        self.radius = radius
        self.down_factor = down_factor
        self._reset()

    def _reset(self) -> None:
        self.announced: Layout | None = None
        self.share: Any = None
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
            self._windows[layout] = layout.window(self.radius, self.down_factor)
        self._windows.move_to_end(layout)
        while len(self._windows) > WINDOWS_KEPT:
            self._windows.popitem(last=False)
        return self._windows[layout]

    def announce(self, layout: Layout, impl: str) -> None:
        """Tell the layout of the forward that begins now, and which implementation will run it."""
        self.announced = layout
        self.impl = impl
        self._is_news = True
        self._announced_window = self.window(layout)
        self._sizes = torch.empty([size + 2 for size in layout], device="meta")

    def compiled(self) -> tuple[Layout, Window]:
        """Layout and window of the forward under way, for code that torch.compile traces.

        Implementations that are custom ops take their numbers as arguments. They are then read from
        the shape of a tensor: such numbers the compiler keeps symbolic (unless 0 or 1), and a new
        resolution does not compile the model again.
        """
        if self.announced is None:
            raise RuntimeError(
                "CLEARProcessor: under torch.compile the token grid must be known beforehand; use "
                "apply_clear instead of set_attn_processor."
            )
        if self.impl not in CUSTOM_OPS:
            return self.announced, self._announced_window
        layout = Layout(*(size - 2 for size in self._sizes.shape))
        return layout, layout.window(self.radius, self.down_factor)

    def find(self, rotary: tuple[torch.Tensor, torch.Tensor], text_length: int | None) -> Layout:
        """The layout of the forward that this rotary table belongs to.

        A table seen before keeps its layout: gradient checkpointing runs a layer again when other
        forwards may have gone by.
        """
        cos, sin = rotary
        layout = self._by_rotary.get(cos)
        if layout is None:
            if self._is_news and self.announced is not None:
                layout = self.announced
                self._is_news = False
            else:
                layout = layout_from_rotary(cos, sin, text_length)
            self._by_rotary[cos] = layout
        return layout
