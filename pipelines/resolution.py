"""What a pipeline needs to paint a picture larger than its model was trained at, in one table.

Every line is a default; make a `Resolution` of your own for anything else.

| picture | positions | shift | proportional attention |
|---|---|---|---|
| up to 1.25 times the native pixels | as trained | the scheduler's | no |
| larger, FLUX.1 (native 1024 px) | "ntk", 10, more above 9K | 3 | from 4096 tokens + text |
| larger, another native size | "yarn", the enlargement | 3 | from native tokens + text |

Why:

- *ntk, 10* is what CLEAR publishes for 4096 x 2048 px (arXiv 2412.16112) and URAE for 2K and 4K
  (arXiv 2503.16322), with FLUX.1-dev. NTK-aware scaling asks for enlargement^(dim / (dim - 2)):
  2.1 at 2K, 4.2 at 4K, 8.6 at 8K, so that 10 serves up to there and the formula takes over. FLUX.1
  itself was not run here.
- *yarn* needs no constant found for one model. On the demo pipeline (native 512 px; enlarged by
  Lanczos to 1024 px, strength 0.55, 8 steps) it was chosen by eye and measurement; see
  `NTK_FACTOR` and the numbers at the table's code.
- *shift 3*: CLEAR's effective one at 4096 x 2048, and FLUX.1-dev's own dynamic one at its native
  size is 3.16. An image-to-image stage starts at its strength whatever the shift, so that it only
  spreads the steps.
- *proportional attention* is part of CLEAR's recipe, with base 4608 = 64^2 + 512.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from clear_dit.compat import names_from
from clear_dit.plugin import attention_layers, transformer_of
from clear_dit.processor import CLEARProcessor

from .positions import ExtendedPosEmbed, check_method
from .schedule import static_scheduler

(FluxPosEmbed,) = names_from("diffusers.models.transformers.transformer_flux", "FluxPosEmbed")

# A picture of up to this many times the native pixels is painted as the model was trained.
NATIVE_SLACK = 1.25

FLUX_NATIVE_SIZE = 1024  # pixels a side
NTK_FACTOR = 10.0
SHIFT = 3.0


@dataclass(frozen=True)
class Resolution:
    """How a picture of one size is painted; the default is as the model was trained.

    Attributes:
        rope: how positions are extended: "none", "ntk", "yarn" or "interpolation"; see
            `ExtendedPosEmbed`.
        rope_factors: for rows and for columns, see `ExtendedPosEmbed`.
        trained_side: extent the model was trained at, in tokens.
        shift: static shift of the noise levels; None for the scheduler's own.
        proportional_base: number of tokens (text + image) at which the scale of attention is the
            trained one; it grows with the logarithm of the tokens. None for that scale always.

    Raises:
        ValueError: a setting out of its range.
    """

    rope: str = "none"
    rope_factors: tuple[float, float] = (1.0, 1.0)
    trained_side: int = 64
    shift: float | None = None
    proportional_base: int | None = None

    def __post_init__(self) -> None:
        check_method(self.rope, self.rope_factors)
        if self.trained_side < 1:
            raise ValueError(f"Resolution: trained_side must be at least 1, got {self}.")
        if self.shift is not None and not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"Resolution: shift must be a positive number, got {self.shift}.")
        if self.proportional_base is not None and self.proportional_base < 2:
            raise ValueError(
                f"Resolution: proportional_base must be at least 2, got {self.proportional_base}."
            )


def settings_for(
    height: int,
    width: int,
    native_size: int = FLUX_NATIVE_SIZE,
    *,
    text_length: int = 512,
    token_pixels: int = 16,
) -> Resolution:
    """The table's line for a picture.

    Both axes have one factor, that of the enlargement by area: a picture of the same shape and the
    native number of pixels is what the model knows, and axes scaled by themselves would distort it.

    Args:
        height, width: of the picture, in pixels.
        native_size: side of the square the model was trained at, in pixels.
        text_length: text tokens the model is given.
        token_pixels: side of a token.
    """
    enlargement = math.sqrt(height * width) / native_size
    side = native_size // token_pixels
    if enlargement**2 <= NATIVE_SLACK:
        return Resolution(trained_side=side)
    if native_size == FLUX_NATIVE_SIZE:
        dim = 56  # channels of the row axis, and of the column axis
        rope, factor = "ntk", max(NTK_FACTOR, enlargement ** (dim / (dim - 2)))
    else:
        rope, factor = "yarn", enlargement
    return Resolution(
        rope=rope,
        rope_factors=(factor, factor),
        trained_side=side,
        shift=SHIFT,
        proportional_base=side**2 + text_length,
    )


@contextmanager
def applied(pipe: Any, resolution: Resolution) -> Iterator[None]:
    """Within it a pipeline paints with these settings; afterwards, or after an error, as before.

    Proportional attention comes by way of the position table, so that it holds whatever computes
    attention: CLEAR, the stock processors, any backend. A `proportional_base` that CLEAR's
    processors have is suspended where the resolution names one: it is the same thing.

    Args:
        pipe: a pipeline with a FLUX transformer, stock or CLEAR's; torch.compile may have wrapped
            the transformer or compiled its blocks.
        resolution: what to set.

    Raises:
        ValueError: an unsupported transformer, or positions or a scheduler somebody else replaced
            by what cannot be extended. Nothing is changed then.
    """
    model = transformer_of(pipe, "applied")
    scheduler, positions = pipe.scheduler, model.pos_embed
    new_scheduler = scheduler
    if resolution.shift is not None:
        new_scheduler = static_scheduler(scheduler, resolution.shift)
    new_positions = _extended(positions, resolution)
    clear = {
        attn.processor: attn.processor.proportional_base
        for attn in attention_layers(model).values()
        if isinstance(attn.processor, CLEARProcessor)
    }
    try:
        pipe.scheduler, model.pos_embed = new_scheduler, new_positions
        if resolution.proportional_base is not None:
            for processor in clear:
                processor.proportional_base = None
        yield
    finally:
        pipe.scheduler, model.pos_embed = scheduler, positions
        for processor, base in clear.items():
            processor.proportional_base = base


def _extended(positions: Any, resolution: Resolution) -> Any:
    """The position embedding of a resolution, with the model's theta and axes."""
    if resolution.rope == "none" and resolution.proportional_base is None:
        return positions
    if not isinstance(positions, (FluxPosEmbed, ExtendedPosEmbed)):
        raise ValueError(
            "CLEAR: only FluxPosEmbed can be extended, but the transformer's pos_embed is a "
            f"{type(positions).__name__}. Put the stock one back, or use Resolution(rope='none', "
            "proportional_base=None)."
        )
    return ExtendedPosEmbed(
        positions.theta,
        positions.axes_dim,
        method=resolution.rope,
        factors=resolution.rope_factors,
        trained_side=resolution.trained_side,
        proportional_base=resolution.proportional_base,
    )
