"""Rotary position tables for images larger than a FLUX model was trained at.

A rotary table turns the position p of a token along an axis into angles p * frequency, one for
every pair of channels. Most methods here are a change of those frequencies, axis by axis; position
ids stay what they are, so that the token grid can still be read from them and from the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..kernels.numbers import as_number, integer, number

METHODS = ("none", "ntk", "yarn", "interpolation", "two")

# NTK-by-parts (arXiv 2309.00071, section 3.2): a pair of channels that turns at least YARN_FAST
# times over the trained extent keeps its frequency, one that turns at most YARN_SLOW times is
# interpolated. The paper's 32 is for texts of thousands of tokens: over the 64 tokens of a FLUX
# image's side the fastest pair turns 64 / 2 pi = 10 times, so that 32 would leave nothing as is.
# Of four ramps tried on the demo at twice its size, 4 to 1 (and less so 4 to 1/4) left a dark line
# along a row or column near the border, and 8 to 2 was softer.
YARN_FAST, YARN_SLOW = 2.0, 0.5

# Tokens that "two" leaves free at both ends of the trained extent. An image ends at the first and
# the last trained position; with several tokens as near to them as that, the demo drew lines along
# the borders (2048 px: the step of brightness there 35 times the usual one, with the margin 2).
MARGIN = 0.5

# Devices without float64, where diffusers too makes its tables in float32.
FLOAT32_DEVICES = ("mps", "npu")


@dataclass(frozen=True)
class Extension:
    """How positions go beyond those a model was trained with; the default changes nothing.

    Attributes:
        rope: how positions are extended: "none", "ntk", "yarn", "interpolation" or "two"; see
            `ExtendedPosEmbed`.
        rope_factors: for rows and for columns, see `ExtendedPosEmbed`.
        trained_side: extent the model was trained at, in tokens.
        proportional_base: number of tokens (text + image) at which the scale of attention is the
            trained one; it grows with the logarithm of the tokens. None for that scale always.

    Raises:
        ValueError: a setting out of its range.
    """

    rope: str = "none"
    rope_factors: tuple[float, float] = (1.0, 1.0)
    trained_side: int = 64
    proportional_base: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_method(self.rope, self.rope_factors)
        who = type(self).__name__
        plain: dict[str, Any] = {
            "rope_factors": tuple(number("rope factors", one) for one in self.rope_factors),
            "trained_side": integer(f"{who}: trained_side", self.trained_side, 1),
        }
        if self.proportional_base is not None:
            base = integer(f"{who}: proportional_base", self.proportional_base, 2)
            plain["proportional_base"] = base
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def changes_positions(self) -> bool:
        """Whether a model needs other position tables."""
        return self.rope != "none" or self.proportional_base is not None


class ExtendedPosEmbed(nn.Module):
    """Stands in for `FluxPosEmbed`; bit for bit the same with method "none" or factors of 1.

    Methods:
        "none": the frequencies of the model.
        "ntk": theta times the factor, as CLEAR and URAE publish it with a factor of 10 for FLUX.1
            at 2K and 4K (arXiv 2412.16112, 2503.16322). The higher a frequency, the less it
            changes.
        "yarn": NTK-by-parts of YaRN (arXiv 2309.00071, section 3.2): frequencies that turn often
            over the trained extent stay, slow ones are divided by the factor, those between are
            blended. YaRN's attention temperature is left to `proportional_base`.
        "interpolation": all frequencies divided by the factor (arXiv 2306.15595): the grid keeps
            the trained extent.
        "two": the frequencies of the model, and a last table in which the image's positions are
            divided by the factors, and begin at `MARGIN` on axes whose factor is not 1: CLEAR's
            processors score keys inside the disc by the first and all others by the last
            (`two_position_attention`); `applied` gives models with stock processors ones that do so
            too. From a factor of some 3 on there are tables between, each scaled some twice as much
            as the one before, for levels of far keys.

    Args:
        theta: base of the model's frequencies.
        axes_dim: channels of the three axes: group, row, column.
        method: one of the above.
        factors: for rows and for columns: current extent / trained extent (for "two" from first
            to last token, and the latter without a `MARGIN` at both ends), or what "ntk" multiplies
            theta by; below 1 positions are spread. The group axis, 0 for all tokens of
            text-to-image, stays as it is.
        trained_side: extent the model was trained at, in tokens; only "yarn" needs it.
        proportional_base: number of tokens (text + image) at which attention has the scale it was
            trained with; None for that scale always. Scores are multiplied by
            sqrt(log_base(tokens)), proportional attention (arXiv 2306.08645), by way of the table:
            queries and keys both get the fourth root, whatever computes their attention.

    Raises:
        ValueError: an unknown method, or a factor that is not a positive number.
    """

    def __init__(
        self,
        theta: float,
        axes_dim: Sequence[int],
        method: str = "none",
        factors: tuple[float, float] = (1.0, 1.0),
        trained_side: int = 64,
        proportional_base: int | None = None,
    ) -> None:
        super().__init__()
        check_method(method, factors)
        self.theta = theta
        self.axes_dim = list(axes_dim)
        self.method = method
        self.factors = (1.0, *factors)
        self.trained_side = trained_side
        self.proportional_base = proportional_base

    def extra_repr(self) -> str:
        return (
            f"method={self.method!r}, factors={self.factors[1:]}, "
            f"proportional_base={self.proportional_base}"
        )

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The table of some position ids.

        Args:
            ids: (text + image, 3): group, row and column of every token.

        Returns:
            cos and sin, (text + image, sum(axes_dim)) each, float32: every angle in two
            neighbouring channels. With "two" also cos and sin of the scaled positions, the least
            scaled first, where reference images (groups other than 0) keep theirs.
        """
        if self.method != "two":
            return self._table(ids)
        ids = ids.float()  # a scaled position is no whole number
        starts = [0.0 if factor == 1 else MARGIN for factor in self.factors]
        tables, of_image = [self._table(ids)], _of_image(ids)
        for factors in self._octaves():
            scaled = ids / ids.new_tensor(factors)
            scaled += ids.new_tensor(starts)
            tables.append(self._table(torch.where(of_image, scaled, ids)))
        return tuple(chain.from_iterable(tables))

    def _octaves(self) -> list[tuple[float, ...]]:
        """The factors of "two", reached in steps of some 2."""
        largest = max(self.factors)
        steps = max(1, round(math.log2(largest)))
        return [
            *(
                tuple(min(factor, largest ** (step / steps)) for factor in self.factors)
                for step in range(1, steps)
            ),
            self.factors,
        ]

    def _table(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.float32 if ids.device.type in FLOAT32_DEVICES else torch.float64
        angles = torch.cat(
            [
                torch.outer(ids[:, axis].float(), self.frequencies(axis, dtype, ids.device))
                for axis in range(ids.shape[1])
            ],
            dim=1,
        ).repeat_interleave(2, dim=1)
        cos, sin = angles.cos().float(), angles.sin().float()
        if self.proportional_base is None:
            return cos, sin
        gain = math.log(len(ids), self.proportional_base) ** 0.25
        return cos * gain, sin * gain

    def frequencies(
        self, axis: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None
    ) -> torch.Tensor:
        """Radians per token for every pair of channels of an axis, (axes_dim[axis] / 2,)."""
        factor = self.factors[axis]
        theta = self.theta * factor if self.method == "ntk" else self.theta
        exponents = torch.arange(0, self.axes_dim[axis], 2, dtype=dtype, device=device)
        frequencies = 1.0 / theta ** (exponents / self.axes_dim[axis])
        if self.method == "interpolation":
            return frequencies / factor
        if self.method == "yarn" and factor != 1:
            turns = self.trained_side * frequencies / (2 * math.pi)
            kept = ((turns - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0, 1)
            return kept * frequencies + (1 - kept) * frequencies / factor
        return frequencies


def _of_image(ids: torch.Tensor) -> torch.Tensor:
    """(text + image, 1): True for tokens of group 0 but text, which is at 0 on every axis.

    So is the image's first token, which follows on the text.
    """
    at_zero = (ids == 0).all(dim=1, keepdim=True).long()
    text_length = at_zero.cumprod(dim=0).sum() - 1
    tokens = torch.arange(len(ids), device=ids.device)[:, None]
    return (ids[:, :1] == 0) & (tokens >= text_length)


def check_method(method: str, factors: tuple[float, float]) -> None:
    """Refuse a method and factors that make no table.

    Raises:
        ValueError: which, and what is possible.
    """
    if method not in METHODS:
        raise ValueError(f"rope must be one of {', '.join(METHODS)}; got {method!r}.")
    several = getattr(factors, "ndim", isinstance(factors, (tuple, list))) == 1
    if (
        not several
        or len(factors) != 2
        or not all((as_number(factor) or 0) > 0 for factor in factors)
    ):
        raise ValueError(
            f"rope factors must be two positive numbers (rows, columns), got {factors}."
        )
