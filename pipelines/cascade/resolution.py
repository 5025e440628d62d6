"""What a pipeline needs to generate an image larger than its model was trained at, in one table.

| image | positions, factor | shift | proportional attention |
|---|---|---|---|
| FLUX.1, up to 1.25 times 1024 x 1024 pixels | as trained | the scheduler's | no |
| FLUX.1, larger | "ntk", 10; from 9K on more | 3 | from 64^2 + text tokens |
| others, up to 1.25 times the native | "two" unless square (*) | the scheduler's | no |
| others, larger, CLEAR without `down_factor` | "two" | 3 | from native + text tokens |
| others, larger, full attention or `down_factor` | "yarn", the enlargement | 3 | the same |

(*) Where a family has no "two" (Stable Diffusion 3), "interpolation" along the longer side.

Why these; all are options of `Resolution`:

- "ntk" with 10 is what CLEAR publishes for FLUX.1-dev at 4096 x 2048 (arXiv 2412.16112) and URAE at
  2K and 4K (arXiv 2503.16322). NTK-aware scaling asks for enlargement^(dim / (dim - 2)), which is
  2.1 at 2K, 4.2 at 4K and 8.6 at 8K: 10 is enough there, and the formula takes over beyond. FLUX.1
  was not run here.
- "yarn" needs no constant found for one model. On the demo pipeline (512 px to 1024 px at strength
  0.55, 8 steps, guidance 2): PSNR of the result, scaled down, to the 512-px image and gradient
  energy against its Lanczos enlargement, with full attention and with radius 8:

      none                        22.8 dB 0.81 (a second moon)  27.4 dB 1.51 (sea in the desert)
      ntk, 2                      22.5 dB 0.91 (a second moon)
      ntk, 10                     28.0 dB 0.96 (faint streaks)  27.1 dB 1.23 (faint streaks)
      yarn                        28.1 dB 0.85                  27.4 dB 1.10
      yarn, proportional                                        27.7 dB 1.29
      interpolation               30.5 dB 0.64 (soft)
      interpolation, proportional 30.8 dB 0.73 (a fine grid)    28.4 dB 0.67 (a fine grid)

  On a second image, proportional, radius 8: yarn 28.6 dB 1.75, ntk 10 29.2 dB 1.81 (a streak).
  These were yarn with a ramp from 4 turns to 1. On a third, one pass, weights made for radius 8:
  that ramp 30.8 dB 1.34 (a dark line), the present one 29.6 dB 1.47, ntk 10 29.4 dB 1.41 (lines).
- Proportional attention is part of CLEAR's recipe, with base 4608 = 64^2 + 512. Above it adds
  sharpness at no loss of fidelity.
- Shift 3 is CLEAR's, and FLUX.1-dev's own at its native size is 3.16. With the start and the number
  of steps given, shifts 1, 3 and 6 came within 0.01 dB on the demo.
- "two" is for local attention: inside the disc true distances are never new to the model, so that
  nothing need be stretched; only text (and pooled keys) look across the image, by positions
  that fill the trained extent. On the demo it left no streak at 2048 px, where "yarn" drew several:
  512 px to 1024 and 2048 px, 12 steps, radius 8 with its weights, fidelity and sharpness as above:

      a tower  yarn 27.9 dB 1.83, 24.5 dB 3.13    two 28.3 dB 2.11, 25.8 dB 4.08
      a house  yarn 23.0 dB 1.66, 21.7 dB 3.01    two 23.2 dB 1.81, 22.2 dB 3.52

  That was without `MARGIN`, which takes lines along the borders away and adds up to 0.5 dB.
  Pooled keys, made of keys closer together than in training, blurred the image with it (1024 px:
  yarn 1.5 and 1.5, two 0.4 and 0.7 times the enlargement's gradient energy). Far keys blur too
  where scaled positions put them among a query's neighbours, so that levels that end within a
  quarter of the longer side or less keep true positions (`Window.levels_by_position`). Without
  weights, bfloat16, by the number of such levels, as it is marked *, all others scaled; 1024 px:
  the mean of four prompts, 2048 px: of three:

      radius  px    yarn            0         1          2          3
      4       1024  28.9 dB 1.78    31.2 1.51  31.2 1.72  29.7 1.83*
      4       2048  29.4 dB 2.24    27.7 0.66  28.4 1.24  28.5 1.94  28.6 2.62*
      8       1024  28.7 dB 1.51    30.8 1.45  29.5 1.64* 28.3 1.67
      8       2048  29.3 dB 1.63    27.8 0.94  27.3 1.26  28.4 2.08*
      8, no far keys, 2048 px       27.4 2.40

  "yarn" drew streaks at 2048 px, and lines at the sides. Where the levels after the true ones were
  scaled by four at once, faint arcs stood around a moon, where these levels begin; with positions
  between there are none. Five prompts, radius 4 with its weights, 2048 px: at once 28.9 dB 2.29,
  with positions between 29.2 dB 2.29; scaled into half the trained extent these drew arcs again.
  4096 px, one prompt, without weights: 28.4 dB 2.91 and 28.9 dB 2.95.
- FLUX.1 was trained at many shapes; a model trained at squares repeats things beyond their side: at
  736 x 352 the demo showed second suns and balloons, cut off what stands on the ground, and "yarn"
  did not help. "two" fits the scene into the image, and true distances nearby keep things in
  shape: full attention with `NEAR` of 5/32 drew suns as ellipses, 8/32 and 3/8 round ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from clear_dit.attention.positions import MARGIN, Extension
from clear_dit.attention.processor import CLEARProcessor
from clear_dit.families.family import Family
from clear_dit.families.flux1 import FAMILY as FLUX
from clear_dit.families.table import attention_layers, family_of, transformer_of
from clear_dit.kernels.numbers import as_number
from clear_dit.weights.forward import Change, changed_in_forwards, other_attributes
from clear_dit.weights.state import ClearState

from .schedule import static_scheduler
from .two_position_processor import TwoPositionsInFullAttention

# An image of up to this many times the native pixels is generated as the model was trained.
NATIVE_SLACK = 1.25

AXIS_DIM = 56  # channels of FLUX.1's row axis, and of its column axis
# Of the trained side: how far full attention sees true distances where positions are two.
NEAR = 3 / 8


@dataclass(frozen=True)
class Resolution(Extension):
    """How an image of one size is generated; the default is as the model was trained.

    Attributes:
        rope, rope_factors, trained_side, proportional_base: see `Extension`.
        shift: static shift of the noise levels; None for the scheduler's own.

    Raises:
        ValueError: a setting out of its range.
    """

    shift: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift is not None:
            shift = as_number(self.shift)
            if shift is None or shift <= 0:
                raise ValueError(f"Resolution: shift must be a positive number, got {self.shift}.")
            object.__setattr__(self, "shift", float(shift))


def settings_for(
    height: int,
    width: int,
    native_size: int | None = None,
    *,
    family: Family | None = None,
    text_length: int = 512,
    token_pixels: int = 16,
    local: bool = False,
) -> Resolution:
    """The table's line for an image.

    "two" gives rows and columns the trained extent, each by its own factor: things keep their shape
    by the true positions near them. Other methods enlarge both alike; only "yarn" and
    "interpolation" go further on an axis that would otherwise be longer than the trained extent.

    Args:
        height, width: of the image, in pixels.
        native_size: side of the square the model was trained at, in pixels; that of the family's
            published models where None.
        family: of the model; FLUX.1 where None.
        text_length: text tokens the model is given.
        token_pixels: side of a token.
        local: whether CLEAR runs, without `down_factor`: by the disc alone or with far keys.
    """
    family = family or FLUX
    recipe = family.recipe
    native_size = native_size or recipe.native_size
    published = native_size == recipe.native_size
    enlargement = max(1.0, math.sqrt(height * width) / native_size)
    large = height * width > NATIVE_SLACK * native_size**2
    side = native_size // token_pixels
    sides = height // token_pixels, width // token_pixels
    rope, factors = "none", (1.0, 1.0)
    if published and recipe.ntk_factor is not None:
        if large:
            factor = max(recipe.ntk_factor, enlargement ** (AXIS_DIM / (AXIS_DIM - 2)))
            rope, factors = "ntk", (factor, factor)
    elif not large and recipe.trained_at(height, width, native_size):
        pass
    elif "two" in family.methods and (local or not large):
        extent = min(side, max(sides))
        # Between the first position the model was trained at and the last.
        room = max(extent - 1 - 2 * MARGIN, 1)
        rows, columns = (1.0 if one == extent else max(one - 1, 1) / room for one in sides)
        if (rows, columns) != (1.0, 1.0):
            rope, factors = "two", (rows, columns)
    elif large or "two" not in family.methods:
        rope = "yarn" if "yarn" in family.methods else "interpolation"
        rows, columns = (max(enlargement, one / side) for one in sides)
        factors = rows, columns
    return Resolution(
        rope=rope,
        rope_factors=factors,
        trained_side=side,
        shift=recipe.shift if large else None,
        proportional_base=side**2 + text_length if large else None,
    )


@contextmanager
def applied(pipe: Any, resolution: Resolution) -> Iterator[None]:
    """Within it a pipeline generates with these settings; afterwards, or after an error, as before.

    The transformer is changed for each forward in this thread, and no longer: others that share it
    do not notice. The pipeline has another scheduler.

    Proportional attention comes by way of the position table, so that it holds whatever computes
    attention: CLEAR, the stock processors, any backend. A `proportional_base` that CLEAR's
    processors have is suspended where the resolution names one: it is the same thing. In families
    whose tables cannot bring it along (`Family.proportional`) CLEAR's processors have it, and stock
    ones do without.

    Args:
        pipe: of a family, with stock processors or CLEAR's; torch.compile may have wrapped the
            transformer or compiled its blocks.
        resolution: what to set.

    Raises:
        ValueError: an unsupported transformer, or positions or a scheduler somebody else replaced
            by what cannot be extended. Nothing is changed then.
    """
    model = transformer_of(pipe, "applied")
    scheduler = new_scheduler = pipe.scheduler
    if resolution.shift is not None:
        new_scheduler = static_scheduler(scheduler, resolution.shift)
    changes: list[Change] = []
    with ClearState.attach(model).access.shared():  # as the model is between forwards
        if resolution.rope == "two":
            two = TwoPositionsInFullAttention(max(1, round(NEAR * resolution.trained_side)))
            two.check(model)
            changes.append(two)
        family, base = family_of(model), resolution.proportional_base
        of_tables = (
            resolution if family.proportional else replace(resolution, proportional_base=None)
        )
        if of_tables.changes_positions:
            changes.append(partial(_with_positions, family.extended(model, of_tables)))
        if base is not None:
            changes.append(partial(_with_base, None if family.proportional else base))
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(changed_in_forwards(model, change))
        pipe.scheduler = new_scheduler
        try:
            yield
        finally:
            pipe.scheduler = scheduler


@contextmanager
def _with_positions(extended: Mapping[str, Any], model: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for name, positions in extended.items():
            stack.enter_context(other_attributes(name, {model: positions}))
        yield


@contextmanager
def _with_base(base: int | None, model: nn.Module) -> Iterator[None]:
    processors = [attn.processor for attn in attention_layers(model).values()]
    clear = [one for one in processors if isinstance(one, CLEARProcessor)]
    with other_attributes("proportional_base", dict.fromkeys(clear, base)):
        yield
