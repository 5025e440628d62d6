"""The window of the forward pass under way, for the layers that take part in it."""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels.window import EVERYTHING, Window
from .grid import layout_from_rotary
from .layout import Layout
from .radii import ByLevel, Radii
from .text_padding import ValidText

logger: logging.Logger = logging.getLogger(__name__)

FAR_BY_DEFAULT = (
    "far keys are on because this model has no CLEAR weights: every image token sees the whole "
    "image, near tokens one by one and far ones pooled; far=False is the paper's CLEAR"
)

# Implementations that torch.compile does not look into.
CUSTOM_OPS = ("triton", "tiled")

# Layouts whose windows are kept per model: two passes of classifier-free guidance at a few
# resolutions.
WINDOWS_KEPT = 8


class Forward(NamedTuple):
    """What the layers of one forward share.

    Attributes:
        layout: where the tokens are.
        valid_text: which of the text's are no padding.
        share: where several processes share the image, a `pipelines.parallel.SharedImage`.
        interval: of noise levels, `Radii.interval`.
    """

    layout: Layout
    valid_text: ValidText | None = None
    share: Any = None
    interval: int = 0


# Place of a radius among the numbers of `_apart`, behind those of any layout.
RADIUS = 2**10

# The forward under way in this thread, and the tracker of the layers it is for.
_UNDER_WAY: ContextVar[tuple[WindowTracker, Forward] | None] = ContextVar(
    "clear_dit_forward", default=None
)


class LayerRadii:
    """A layer's radii, and while a forward is announced to compiled layers, the one it has then.

    Attributes:
        radii: one for each interval of noise levels.
        sees_everything: whether the layer does so in the forward.
        size: an empty tensor, of whose shape is the radius, see `WindowTracker.compiled`.
        window: the layer's in the forward.
    """

    def __init__(self, radii: ByLevel) -> None:
        self.radii = radii
        self.sees_everything: bool = False
        self.size: torch.Tensor = torch.empty(0, device="meta")
        self.window: Window | None = None

    def announce(self, radius: int, window: Window | None) -> None:
        """What the layer has in a forward."""
        self.sees_everything = radius == EVERYTHING
        self.size = torch.empty(0, _apart(RADIUS) + min(radius, EVERYTHING - 1), device="meta")
        if not torch.compiler.is_compiling():  # else it is traced, and cannot be
            torch._dynamo.maybe_mark_dynamic(self.size, 1)
        self.window = window


class WindowTracker:
    """The windows of a model's layers, and which of them the forward under way has.

    A forward is told by whoever sees its arguments (`under_way`), for its duration and its thread
    alone; or it is found from the rotary table that every layer of it receives. Windows are
    remembered, so that what an implementation keeps on a `Window` serves all layers and steps;
    rotary tables are held by weak reference only.

    Args:
        radii: of the layers' windows.
        down_factor, far_levels, pooled_weight: of the windows, see `Window`.

    Attributes:
        far_by_default: whether far keys are on because neither a setting nor weights say otherwise.
    """

    def __init__(
        self, radii: Radii, down_factor: int, far_levels: int = 0, pooled_weight: str = "one"
    ) -> None:
        self.radii = radii
        self.down_factor = down_factor
        self.far_levels: int = far_levels
        self.pooled_weight = pooled_weight
        self.far_by_default: bool = False
        self._reset()

    def _reset(self) -> None:
        self.announced: Forward | None = None
        self.impl: str = "auto"
        self._far_is_news = True
        self._lock = threading.Lock()  # of what is remembered
        self._windows: OrderedDict[Layout, dict[int, Window]] = OrderedDict()
        self._by_rotary = WeakTensorKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        names = ("radii", "down_factor", "far_levels", "pooled_weight", "far_by_default")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def take_far(self, far_levels: int, by_default: bool) -> None:
        """Make windows with so many levels of far keys from now on."""
        if far_levels != self.far_levels:
            with self._lock:
                self.far_levels = far_levels
                self._windows.clear()
        self.far_by_default = by_default

    def say_far(self) -> None:
        """Log, once, that far keys are on by default, if they are."""
        if self._far_is_news and self.far_by_default:
            self._far_is_news = False
            logger.info(FAR_BY_DEFAULT)

    def _window(self, layout: Layout, radius: int) -> Window:
        return layout.window(radius, self.down_factor, self.far_levels, self.pooled_weight)

    def window(self, layout: Layout, radius: int) -> Window:
        """The window for a layout and a layer's radius: always the same object while in use."""
        if torch.compiler.is_compiling() and self.impl in CUSTOM_OPS:
            # To look it up would make constants of numbers that are symbolic, see `compiled`.
            return self._window(layout, radius)
        with self._lock:
            windows = self._windows.setdefault(layout, {})
            self._windows.move_to_end(layout)
            while len(self._windows) > WINDOWS_KEPT:
                self._windows.popitem(last=False)
            if radius not in windows:
                windows[radius] = self._window(layout, radius)
            return windows[radius]

    @property
    def current(self) -> Forward | None:
        """The forward under way in this thread, where it was told."""
        found = _UNDER_WAY.get()
        return None if found is None or found[0] is not self else found[1]

    @contextmanager
    def under_way(self, forward: Forward) -> Iterator[None]:
        """Within it, in this thread, this forward of the model is under way."""
        token = _UNDER_WAY.set((self, forward))
        try:
            yield
        finally:
            _UNDER_WAY.reset(token)

    @contextmanager
    def announced_to_compiled(
        self, forward: Forward, impl: str, layers: Sequence[LayerRadii]
    ) -> Iterator[None]:
        """Within it compiled layers know this forward, and which implementation runs it.

        What torch.compile traces can read no context: the forward must have the model for itself.
        """
        layout = forward.layout
        self.announced = forward
        self.impl = impl
        for layer in layers:
            radius = layer.radii[forward.interval]
            layer.announce(radius, self.window(layout, radius))
        sizes = [layout.text_length, layout.rows, layout.columns, layout.reference_length]
        sizes += chain(*layout.local_references)
        self._sizes = [
            torch.empty(0, _apart(place) + size, device="meta") for place, size in enumerate(sizes)
        ]
        try:
            yield
        finally:
            self.announced = None
            for layer in layers:
                layer.window = None

    def compiled(self, layer: LayerRadii) -> tuple[Layout, Window]:
        """Layout and window of the forward under way, for code that torch.compile traces.

        Args:
            layer: its radii.

        Implementations that are custom ops take their numbers as arguments. They are then read from
        the shapes of empty tensors, one each: such numbers the compiler keeps symbolic, unless 0 or
        1 or equal to another (see `_apart`), and a new resolution compiles nothing again, nor does
        a layer with another radius.
        """
        if self.announced is None:
            raise RuntimeError(
                "CLEARProcessor: under torch.compile the token grid must be known beforehand; use "
                "apply_clear instead of set_attn_processor."
            )
        if self.announced.valid_text is not None:
            raise ValueError(
                "CLEAR: prompts of different lengths in one batch do not work under torch.compile; "
                "run them one by one."
            )
        if self.announced.share is not None:
            raise RuntimeError(
                "CLEARProcessor: torch.compile does not work with patch parallelism; leave the "
                "model uncompiled."
            )
        layout = self.announced.layout
        if self.impl not in CUSTOM_OPS:
            assert layer.window is not None
            return layout, layer.window
        text, rows, columns, references, *local = (
            tensor.shape[1] - _apart(place) for place, tensor in enumerate(self._sizes)
        )
        local_references = tuple(zip(local[::2], local[1::2], strict=True))
        layout = Layout(text, rows, columns, references, layout.image_first, local_references)
        radius = EVERYTHING if layer.sees_everything else layer.size.shape[1] - _apart(RADIUS)
        return layout, self.window(layout, radius)

    def find(
        self,
        rotary: tuple[torch.Tensor, ...],
        text_length: int | None,
        local_references: bool = False,
    ) -> Forward:
        """The forward that this rotary table belongs to.

        A table seen before keeps its layout: gradient checkpointing runs a layer again when other
        forwards may have gone by.

        Args:
            rotary: cos, sin, ...; see `layout_from_rotary` for these and the others.
        """
        cos, sin = rotary[:2]
        forward = self.current or self._seen(cos)
        if forward is None:
            self.refuse_unknown_level()
            layout = layout_from_rotary(cos, sin, text_length, local_references)
            forward = Forward(layout)
        self._remember(cos, forward)
        return forward

    def told(self, key: torch.Tensor | None) -> Forward:
        """The forward under way, for layers from whose arguments a layout cannot be found.

        Args:
            key: a tensor that all layers of one forward receive, and no other forward; None where
                there is none. It does for gradient checkpointing what the rotary table does above.

        Raises:
            ValueError: none is.
        """
        forward = self.current
        if forward is None and key is not None:
            forward = self._seen(key)
        if forward is None:
            raise ValueError(
                "CLEAR: the token grid is not known in this layer, which was called outside of a "
                "forward of its model, by a forward that was put in the place of the model's since "
                "apply_clear, or got its processor without apply_clear; call apply_clear on the "
                "model or pipeline, and the model as a whole."
            )
        if key is not None:
            self._remember(key, forward)
        return forward

    def refuse_unknown_level(self) -> None:
        """Where no forward was told, refuse radii by noise level.

        Raises:
            ValueError: there are such.
        """
        if self.radii.levels:
            raise ValueError(
                "CLEAR: radii by noise level need the forward's noise level, but this layer was "
                "called outside of a forward of its model; call the model as a whole."
            )

    def _seen(self, key: torch.Tensor) -> Forward | None:
        with self._lock:
            return self._by_rotary.get(key)

    def _remember(self, key: torch.Tensor, forward: Forward) -> None:
        with self._lock:
            self._by_rotary[key] = forward


class CarryingCheckpoint:
    """Gradient checkpointing of a diffusers model that takes the forward under way along.

    The layers run again in the backward pass, when their forward is over and another may have gone
    by, maybe in another thread.

    Args:
        stock: the model's own `_gradient_checkpointing_func`.
    """

    def __init__(self, stock: Callable[..., Any]) -> None:
        self.stock = stock

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        under_way = _UNDER_WAY.get()
        if under_way is not None:
            function = functools.partial(_again, under_way, function)
        # HunyuanImage's forward names some, and diffusers' function takes none by name.
        return self.stock(functools.partial(function, **kwargs), *args)


def _again(
    under_way: tuple[WindowTracker, Forward],
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    tracker, forward = under_way
    with tracker.under_way(forward):
        return function(*args, **kwargs)


def _apart(place: int) -> int:
    """What is added to a number before it becomes a length: none is 0 or 1, no two are equal."""
    return (place + 1) << 32
