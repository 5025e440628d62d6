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


@contextmanager
def two_positions_in_full_attention(model: nn.Module, radius: int) -> Iterator[None]:
    """Within it stock processors understand the position table of "two"; CLEAR's do anyway.

    Args:
        model: a FLUX transformer.
        radius: in tokens, see `full_two_position_attention`.

    Raises:
        ValueError: a layer has a processor that is neither stock nor CLEAR's.
    """
    settings, tracker = CLEARProcessor(radius), WindowTracker(radius, 1)
    layers = attention_layers(model)
    before = {
        name: attn.processor
        for name, attn in layers.items()
        if not isinstance(attn.processor, CLEARProcessor)
    }
    for name, processor in before.items():
        if type(processor) not in (FluxAttnProcessor, FluxIPAdapterAttnProcessor):
            raise ValueError(
                f'CLEAR: rope "two" is for stock processors and CLEAR\'s, but {name} has '
                f'{type(processor).__name__}; use "yarn".'
            )
    try:
        for name, processor in before.items():
            adapter = None if type(processor) is FluxAttnProcessor else processor
            layers[name].set_processor(FullTwoPositionProcessor(settings, tracker, adapter))
        yield
    finally:
        for name, processor in before.items():
            layers[name].set_processor(processor)
