"""The geometry of CLEAR attention (arXiv 2412.16112, section 3.2) as one value.

A token is one packed latent patch: 16 x 16 pixels for FLUX. The sequence is text tokens first, then
the image tokens in raster order. Keys may be followed by pooled tokens (see `pooling.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Window:
    """Who attends to whom, in tokens.

    - An image query at (y, x) sees the image keys at (y', x') with
      (y - y')^2 + (x - x')^2 < radius^2 (strict; nothing beyond the border), all text keys and,
      with `down_factor` > 1, all pooled keys.
    - A text query sees all text keys and all image keys, but no pooled key.

    Attributes:
        height: rows of the image's token grid, at least 1.
        width: columns of the image's token grid, at least 1.
        text_length: number of text tokens, at least 0.
        radius: radius of the disc, in tokens, at least 1 (1 is the token itself).
        down_factor: side of a pooling cell, in tokens; 1 means no pooled keys.

    Raises:
        TypeError: a field is not an int.
        ValueError: a field is out of its range, or a pooling cell is larger than the grid.
    """

    height: int
    width: int
    text_length: int
    radius: int
    down_factor: int = 1

    def __post_init__(self) -> None:
        minimum = {"height": 1, "width": 1, "text_length": 0, "radius": 1, "down_factor": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"Window: {field.name} must be an int, got {value!r}.")
            if value < minimum[field.name]:
                raise ValueError(
                    f"Window: {field.name} must be at least {minimum[field.name]} token(s), "
                    f"got {value}."
                )
        if self.down_factor > 1 and self.down_factor > min(self.height, self.width):
            raise ValueError(
                f"Window: down_factor must not exceed the token grid ({self.height} x "
                f"{self.width}), got {self.down_factor}; use a larger picture or down_factor=1."
            )

    def __getstate__(self) -> dict[str, int]:
        # What an implementation remembered on the value (FlexAttention's mask) stays behind.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def disc_radius(self) -> int:
        """The radius, no larger than is needed to cover the grid: its square stays small."""
        return min(self.radius, self.height + self.width)

    @property
    def image_length(self) -> int:
        """Number of image tokens."""
        return self.height * self.width

    @property
    def sequence_length(self) -> int:
        """Number of queries: text and image tokens."""
        return self.text_length + self.image_length

    @property
    def pooled_length(self) -> int:
        """Number of pooled keys; a last partial cell in either direction counts as a cell."""
        if self.down_factor == 1:
            return 0
        return math.ceil(self.height / self.down_factor) * math.ceil(self.width / self.down_factor)

    def mask(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Dense mask, True where a query attends to a key.

        Returns:
            bool, (text + image, text + image + pooled). Quadratic: for tests and oracles.
        """
        text, pooled = self.text_length, self.pooled_length
        y = torch.arange(self.height, device=device).repeat_interleave(self.width)
        x = torch.arange(self.width, device=device).repeat(self.height)
        distance2 = (y[:, None] - y[None, :]) ** 2 + (x[:, None] - x[None, :]) ** 2
        mask = torch.ones(
            self.sequence_length, self.sequence_length + pooled, dtype=torch.bool, device=device
        )
        mask[text:, text : self.sequence_length] = distance2 < self.disc_radius**2
        mask[:text, self.sequence_length :] = False
        return mask

    def disc_pairs(self) -> int:
        """Number of (image query, image key) pairs inside the disc, over the whole grid."""
        radius = self.disc_radius
        reach = radius - 1
        pairs = 0
        for dy in range(-min(reach, self.height - 1), min(reach, self.height - 1) + 1):
            # Largest dx with dx^2 + dy^2 < radius^2, within the grid.
            half = min(math.isqrt(radius**2 - dy**2 - 1), self.width - 1)
            columns = (2 * half + 1) * self.width - half * (half + 1)
            pairs += columns * (self.height - abs(dy))
        return pairs

    def attended_pairs(self) -> int:
        """Number of (query, key) pairs: the sum of `mask()`, in closed form."""
        text, image = self.text_length, self.image_length
        return text * (text + image) + image * (text + self.pooled_length) + self.disc_pairs()

    def attention_flops(self, heads: int, head_dim: int) -> int:
        """Floating-point operations of one attention layer, batch 1.

        4 * attended pairs * heads * head_dim: two for each product of query and key, two for each
        product of probability and value (as the paper's table 2 counts; softmax not counted).
        """
        return 4 * self.attended_pairs() * heads * head_dim
