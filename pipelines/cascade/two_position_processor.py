"""Full attention with two positions a token, in place of a family's stock processors."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from clear_dit.attention.processor import CLEARProcessor
from clear_dit.attention.radii import Radii
from clear_dit.attention.text_padding import Projected
from clear_dit.attention.tracker import WindowTracker
from clear_dit.families.family import Family
from clear_dit.families.table import attention_layers, family_of
from clear_dit.kernels.two_positions import Scaled, full_two_position_attention
from clear_dit.kernels.window import Window
from clear_dit.weights.forward import other_attributes


class FullTwoPositions(CLEARProcessor):
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


@functools.cache
def full_processor(local: Any) -> Any:
    """The processor that is like one of a family's, but for full attention with two positions."""
    return type(f"{local.__name__}OfTwoPositions", (FullTwoPositions, local), {})


class TwoPositionsInFullAttention:
    """A change of a model: stock processors understand the position tables of "two".

    CLEAR's do anyway.

    Args:
        radius: in tokens, see `full_two_position_attention`.
    """

    def __init__(self, radius: int) -> None:
        self._settings, self._tracker = CLEARProcessor(radius), WindowTracker(Radii(radius), 1)
        # Of each stock processor: always the same, or compiled layers would be compiled anew.
        self._made: dict[Any, Any] = {}

    def check(self, model: nn.Module) -> None:
        """Refuse layers that have no such table, or a processor neither stock nor CLEAR's.

        Raises:
            ValueError: the layer, or the family.
        """
        family = family_of(model)
        for name, attn in attention_layers(model).items():
            kind = type(attn.processor)
            ours = kind if isinstance(attn.processor, CLEARProcessor) else None
            ours = ours or family.processors.get(kind.__name__)
            if ours is None:
                raise ValueError(
                    f'CLEAR: rope "two" is for stock processors and CLEAR\'s, but {name} has '
                    f'{kind.__name__}; use "yarn".'
                )
            if not ours.rotary:
                raise ValueError(
                    f'CLEAR: rope "two" is for rotary embedding, which {family.title} has not; use '
                    'rope "none".'
                )

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        """Within it the model has such processors."""
        self.check(model)
        family = family_of(model)
        others = {
            attn: self._of(family, attn.processor)
            for attn in attention_layers(model).values()
            if not isinstance(attn.processor, CLEARProcessor)
        }
        others |= {
            attn: self._of_text(family, attn.processor) for attn in family.text_layers(model)
        }
        with other_attributes("processor", others):
            yield

    def _of(self, family: Family, stock: Any) -> Any:
        if stock not in self._made:
            local: Any = family.processors[type(stock).__name__]
            made = full_processor(local).for_layer(self._settings, self._tracker, stock)
            self._made[stock] = made
        return self._made[stock]

    def _of_text(self, family: Family, stock: Any) -> Any:
        if stock not in self._made:
            made = self._made[stock] = family.text_processors[type(stock).__name__]()
            made._attention_backend = stock._attention_backend
        return self._made[stock]
