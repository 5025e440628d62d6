"""FLOPs of a forward pass for images of any size, from two that are counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..kernels.window import Window
from .flops import count_flops

# Sides in tokens of the images that are counted: a multiple of 32 tokens, to which Z-Image pads
# them, and small, for positions end somewhere.
COUNTED = ((4, 8), (8, 8))


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of a forward pass at batch 1, as `count_flops` counts them, with text of one length.

    All but the attention of an image to itself is linear in its tokens.

    Attributes:
        fixed, per_token: of that which is linear.
        layers: of attention over the image.
        heads, head_dim: of such a layer.
    """

    fixed: float
    per_token: float
    layers: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, config: dict[str, Any], text_length: int) -> PassFlops:
        """Those of a transformer by its configuration.

        Raises:
            RequestError: it cannot be built.
        """
        windows = [Window(*size, text_length, 1) for size in COUNTED]
        counts = [count_flops(config, window) for window in windows]
        known = cls(0, 0, *(counts[0][name] for name in ("layers", "heads", "head_dim")))
        tokens = [window.image_length for window in windows]
        linear = [
            1e12 * count["rows"][0]["total_tflop"] - known.full(number)
            for count, number in zip(counts, tokens, strict=True)
        ]
        slope = (linear[1] - linear[0]) / (tokens[1] - tokens[0])
        fixed = linear[0] - slope * tokens[0]
        return cls(fixed, slope, known.layers, known.heads, known.head_dim)

    def linear(self, tokens: int) -> float:
        """Besides attention of so many image tokens to each other."""
        return self.fixed + self.per_token * tokens

    def full(self, tokens: int) -> float:
        """With full attention of so many image tokens."""
        return self.linear(tokens) + self.layers * 4 * tokens**2 * self.heads * self.head_dim

    def local(self, window: Window) -> float:
        """With CLEAR. The text is that of `of`, whatever the window says."""
        own = replace(window, text_length=0).attention_flops(self.heads, self.head_dim)
        return self.linear(window.image_length) + self.layers * own
