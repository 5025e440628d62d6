"""What the processors of the families beside FLUX.1 share.

Such a processor projects, norms and rotates as the stock one does, and gives query, key and value
to `attend_streams` (text and image apart) or `attend_joint` (one sequence). Where the tokens are it
is told: by `apply_clear`'s hook on the model, which reads the arguments of every forward.
"""

from __future__ import annotations

from typing import Any

import torch

from ..attention.layout import Layout
from ..attention.processor import CLEARProcessor
from ..attention.text_padding import Projected, ValidText
from ..attention.tracker import WindowTracker
from ..kernels.window import Window


class JointProcessor(CLEARProcessor):
    """A `CLEARProcessor` that belongs to one layer; families implement `__call__`.

    Its arguments are those of the stock processor it takes the place of.

    Args:
        settings: the processor whose settings this one takes.
        tracker: that of all layers of a model.
    """

    def __init__(
        self, settings: CLEARProcessor | None = None, tracker: WindowTracker | None = None
    ) -> None:
        super().__init__(**({} if settings is None else settings.settings))
        self.blank = settings is None  # made again by diffusers, see `weights/reconcile.py`
        if tracker is not None:
            self.tracker = tracker

    @classmethod
    def for_layer(
        cls, settings: CLEARProcessor, tracker: WindowTracker, old: Any
    ) -> JointProcessor:
        """The processor that takes the place of `old`."""
        return cls(settings, tracker)

    def stock(self) -> Any:
        """What it takes the place of, where one layer may have several such; else None."""
        return None

    def under_way(
        self, key: torch.Tensor | None = None
    ) -> tuple[Layout, ValidText | None, Window | None]:
        """Layout, places of valid text, and window where torch.compile traces the layer.

        Args:
            key: see `WindowTracker.told`.
        """
        if torch.compiler.is_compiling():
            layout, window = self.tracker.compiled()
            return layout, None, window
        forward = self.tracker.told(key)
        return forward.layout, forward.valid_text, None

    def attend_streams(
        self, image: Projected, text: Projected | None = None, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Local attention over text and image that a layer has apart.

        Args:
            image: query, key, value of image and references, (batch, image, heads, head_dim).
            text: the same of the text, (batch, text, heads, head_dim); None in a layer in which
                image tokens attend to each other only.
            key: see `WindowTracker.told`.

        Returns:
            (image, text), (batch, tokens, heads * head_dim) each; text is empty where none came.
        """
        layout, valid_text, window = self.under_way(key)
        if text is None:
            layout, valid_text, window = layout.image_only, None, None
        _check_length(layout.image_only, image[0], "image")
        stream = layout.image_only
        query, key_, value = (stream.to_local(x) for x in image)
        if text is not None:
            _check_text(layout, text[0])
            query, key_, value = (
                torch.cat(pair, dim=1) for pair in zip(text, (query, key_, value), strict=True)
            )
        out = self._local((query, key_, value), layout, valid_text, window).flatten(2, 3)
        text_out, image_out = out.to(query.dtype).tensor_split([layout.text_length], dim=1)
        return stream.to_layer(image_out), text_out

    def attend_joint(
        self,
        tensors: Projected,
        layout: Layout,
        valid_text: ValidText | None = None,
        window: Window | None = None,
    ) -> torch.Tensor:
        """Local attention over one sequence in the order of `Layout.to_local`.

        A layer brings its hidden states into that order before it projects them, and its output
        back with `Layout.to_layer`: one copy each way instead of three, and none where the orders
        are the same.

        Args:
            tensors: query, key, value, (batch, sequence, heads, head_dim) each.
            layout, valid_text, window: from `under_way`.

        Returns:
            (batch, sequence, heads * head_dim), in the same order.
        """
        _check_length(layout, tensors[0], "sequence")
        out = self._local(tensors, layout, valid_text, window).flatten(2, 3)
        return out.to(tensors[0].dtype)


def _check_length(layout: Layout, query: torch.Tensor, what: str) -> None:
    if query.shape[1] != layout.sequence_length:
        raise ValueError(
            f"CLEARProcessor: the forward under way has {layout.text_length} text tokens and "
            f"{layout.rows} x {layout.columns} image tokens{layout.and_references}, but the "
            f"layer's {what} has {query.shape[1]}."
        )


def _check_text(layout: Layout, query: torch.Tensor) -> None:
    if query.shape[1] != layout.text_length:
        raise ValueError(
            f"CLEARProcessor: the forward under way has {layout.text_length} text tokens, but the "
            f"layer got {query.shape[1]}."
        )
