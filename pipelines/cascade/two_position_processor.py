"""Full attention with two positions a token, in place of FLUX's stock processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from clear_dit.attention.ip_adapter import FluxIPAdapterAttnProcessor, LayerProcessor
from clear_dit.attention.processor import CLEARProcessor, FluxAttnProcessor
from clear_dit.attention.text_padding import Projected
from clear_dit.attention.tracker import WindowTracker
from clear_dit.families.table import attention_layers
from clear_dit.kernels.two_positions import Scaled, full_two_position_attention
from clear_dit.kernels.window import Window
from clear_dit.weights.forward import other_attributes


class FullTwoPositionProcessor(LayerProcessor):
    """Full attention; image tokens nearer than the radius see each other's true distance."""

    local = False

    def _attention(
        self,
        tensors: Projected,
        scaled: Scaled | None,
        window: Window,
        **options: Any,
    ) -> torch.Tensor:
        assert scaled is not None
        (query, key, value), scale = tensors, options["scale"]
        return full_two_position_attention((query, key), scaled.far(), value, window, scale=scale)


class TwoPositionsInFullAttention:
    """A change of a model: stock processors understand the position table of "two".

    CLEAR's do anyway.

    Args:
        radius: in tokens, see `full_two_position_attention`.
    """

    def __init__(self, radius: int) -> None:
        self._settings, self._tracker = CLEARProcessor(radius), WindowTracker(radius, 1)
        # Of each stock processor: always the same, or compiled layers would be compiled anew.
        self._made: dict[Any, FullTwoPositionProcessor] = {}

    def check(self, model: nn.Module) -> None:
        """Refuse a layer whose processor is neither stock nor CLEAR's, with a ValueError."""
        for name, attn in attention_layers(model).items():
            stock = (FluxAttnProcessor, FluxIPAdapterAttnProcessor)
            if not isinstance(attn.processor, CLEARProcessor) and type(attn.processor) not in stock:
                raise ValueError(
                    f'CLEAR: rope "two" is for stock processors and CLEAR\'s, but {name} has '
                    f'{type(attn.processor).__name__}; use "yarn".'
                )

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """Within it the model has such processors."""
        self.check(model)
        others = {
            attn: self._of(attn.processor)
            for attn in attention_layers(model).values()
            if not isinstance(attn.processor, CLEARProcessor)
        }
        with other_attributes("processor", others):
            yield

    def _of(self, stock: Any) -> FullTwoPositionProcessor:
        if stock not in self._made:
            adapter = None if type(stock) is FluxAttnProcessor else stock
            made = FullTwoPositionProcessor(self._settings, self._tracker, adapter)
            self._made[stock] = made
        return self._made[stock]
