"""FLOPs of a forward pass for images of any size, from two small ones that are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..families.schedule import Schedule
from ..families.table import family_of, head_dim_of, heads_of
from ..kernels.cells import FAR_LEVELS
from ..kernels.window import Window
from .fake import build, defaults, quiet
from .inputs import Empty, forward, model_inputs, positions_for
from .memory import COUNTS

# Sides in tokens of the images that are counted: a multiple of 32 tokens, to which Z-Image pads
# them, and small, for positions end somewhere.
COUNTED = ((4, 8), (8, 8))


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of a forward pass at batch 1, as `count_flops` counts them, with text of one length.

    All but the attention of an image to itself is linear in its tokens, and in the blocks of each
    kind, which are counted in models of one and two of them, unless it says that some are unlike.

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
    def of(cls, config: Mapping[str, Any], text_length: int) -> PassFlops:
        """Those of a transformer by its configuration.

        Raises:
            RequestError: it cannot be built.
        """
        blocks = {} if config.get("dual_attention_layers") else _blocks(config)
        small = {**config, **{name: min(1, number) for name, number in blocks.items()}}
        found = cls._counted(small, text_length)
        more = [
            (number - 1, cls._counted({**small, name: 2}, text_length))
            for name, number in blocks.items()
            if number > 1
        ]
        return replace(
            found,
            **{
                name: getattr(found, name)
                + sum(number * (getattr(one, name) - getattr(found, name)) for number, one in more)
                for name in ("fixed", "per_token", "layers")
            },
        )

    @classmethod
    def _counted(cls, config: Mapping[str, Any], text_length: int) -> PassFlops:
        """Those of a model that is counted as it is."""
        with defaults(torch.float32, "meta"):
            model = build(dict(config))
        layers = family_of(model).layers(model).values()
        known = cls(0, 0, len(layers), heads_of(next(iter(layers))), head_dim_of(model))
        windows = [Window(*size, text_length, 1) for size in COUNTED]
        few, many = (window.image_length for window in windows)
        least, most = (_count(model, one) - known.full(one.image_length) for one in windows)
        slope = (most - least) / (many - few)
        return replace(known, fixed=least - slope * few, per_token=slope)

    def linear(self, tokens: int) -> float:
        """Besides attention of so many image tokens to each other."""
        return self.fixed + self.per_token * tokens

    def full(self, tokens: int) -> float:
        """With full attention of so many image tokens."""
        return self.linear(tokens) + self.layers * 4 * tokens**2 * self.heads * self.head_dim

    def local(self, window: Window) -> float:
        """With CLEAR. The text is that of `of`, whatever the window says."""
        return self.linear(window.image_length) + self.layers * self._own(window)

    def scheduled(self, window: Window, schedule: Schedule, level: float) -> float:
        """With the radii of a schedule, in a forward at a noise level from 1 to 0.

        Args:
            window: whose radius does not count; far keys are the schedule's.
        """
        window = replace(window, far_levels=FAR_LEVELS if schedule.far else 0)
        interval = schedule.radii.interval(level)
        radii = Counter(radii[interval] for _, radii in schedule.layers)
        own = sum(number * self._own(window.with_radius(each)) for each, number in radii.items())
        return self.linear(window.image_length) + own

    def _own(self, window: Window) -> int:
        """Of one layer's attention of the image to itself."""
        return replace(window, text_length=0).attention_flops(self.heads, self.head_dim)


def _blocks(config: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of blocks of each kind, by what a configuration calls them."""
    return {name: config[name] for _, name in COUNTS if name in config}


def _count(model: Any, window: Window) -> int:
    """FLOPs of a forward with full attention."""
    inputs = model_inputs(model, window, Empty(torch.float32, "meta"))
    with (
        positions_for(model, window, inputs),
        FlopCounterMode(display=False) as counter,
        quiet(),
        torch.no_grad(),
    ):
        forward(model, inputs)
    return sum(counter.get_flop_counts()["Global"].values())
