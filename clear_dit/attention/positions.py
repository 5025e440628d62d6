"""How positions go beyond those a model was trained with, and FLUX.1's table by that.

Position ids stay what they are, so that the token grid can still be read from them and from the
table. With "two" a token has several positions: their tables stand beside each other in the last
dimension, as models put tables together token by token. FLUX.1's model passes a tuple on as it is,
and gets a longer one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn

from ..kernels.numbers import as_number, integer, number
from .axes import MARGIN as MARGIN
from .axes import Axis, cos_and_sin, of_tokens

METHODS = ("none", "ntk", "yarn", "interpolation", "two")


@dataclass(frozen=True)
class Extension:
    """How positions go beyond those a model was trained with; the default changes nothing.

    Methods:
        "none": the frequencies of the model, whatever the factors.
        "ntk": theta times the factor, as CLEAR and URAE publish it with a factor of 10 for FLUX.1
            at 2K and 4K (arXiv 2412.16112, 2503.16322). The higher a frequency, the less it
            changes.
        "yarn": NTK-by-parts of YaRN (arXiv 2309.00071, section 3.2): frequencies that turn often
            over the trained extent stay, slow ones are divided by the factor, those between are
            blended. YaRN's attention temperature is left to `proportional_base`.
        "interpolation": all frequencies divided by the factor (arXiv 2306.15595): the grid keeps
            the trained extent. A stored table is resampled, `MARGIN` off both ends of that extent.
        "two": the frequencies of the model, and a last table in which the image's positions are
            divided by the factors, and begin at `MARGIN` on axes whose factor is not 1: CLEAR's
            processors score keys inside the disc by the first and all others by the last
            (`two_position_attention`); `applied` gives models with stock processors ones that do so
            too. From a factor of some 3 on there are tables between, each scaled some twice as much
            as the one before, for levels of far keys. Text and reference images keep their
            positions, or follow the image's where these begin behind it.

    Attributes:
        rope: one of the above.
        rope_factors: for rows and for columns: current extent / trained extent (for "two" from
            first to last token, and the latter without a `MARGIN` at both ends), or what "ntk"
            multiplies theta by; below 1 positions are spread. A factor of 1 changes nothing.
        trained_side: extent the model was trained at, in tokens; only "yarn" needs it.
        proportional_base: number of tokens (text + image) at which attention has the scale it was
            trained with; None for that scale always. Scores are multiplied by
            sqrt(log_base(tokens)), proportional attention (arXiv 2306.08645).

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

    def axes(self, theta: float, dims: Sequence[int], rows: int) -> tuple[Axis, ...]:
        """Those of a rotary table.

        Args:
            theta: base of the model's frequencies.
            dims: channels of every axis.
            rows: which of them is that of the image's rows; columns are the next. Others, such as
                one for groups of tokens, stay as they are.
        """
        of_rows, of_columns = (1.0, 1.0) if self.rope == "none" else self.rope_factors
        factors = {rows: of_rows, rows + 1: of_columns}
        return tuple(
            Axis(theta, dim, self.rope, factors.get(place, 1.0), self.trained_side)
            for place, dim in enumerate(dims)
        )

    def gain(self, tokens: int) -> float:
        """Of a rotary table: both queries and keys get the fourth root of what scores get."""
        base = self.proportional_base
        return 1.0 if base is None else math.log(tokens, base) ** 0.25


class ExtendedPosEmbed(nn.Module):
    """Stands in for `FluxPosEmbed`; bit for bit the same with method "none" or factors of 1.

    Args:
        theta: base of the model's frequencies.
        axes_dim: channels of the three axes: group, row, column. The group axis, 0 for all tokens
            of text-to-image, stays as it is.
        method, factors, trained_side, proportional_base: see `Extension`. Proportional attention
            comes by way of the table, whatever computes attention.

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
        self.theta = theta
        self.axes_dim: list[int] = list(axes_dim)
        self.extension: Extension = Extension(
            method, factors, trained_side, proportional_base=proportional_base
        )
        self.axes: tuple[Axis, ...] = self.extension.axes(theta, self.axes_dim, rows=1)

    @classmethod
    def of(cls, stock: Any, extension: Extension) -> Self:
        """What stands in for a module with the same `theta` and `axes_dim`."""
        return cls(
            stock.theta,
            stock.axes_dim,
            extension.rope,
            extension.rope_factors,
            extension.trained_side,
            extension.proportional_base,
        )

    def extra_repr(self) -> str:
        return str(self.extension)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The table of some position ids.

        Args:
            ids: (text + image, 3): group, row and column of every token.

        Returns:
            cos and sin, (text + image, sum(axes_dim)) each, float32: every angle in two
            neighbouring channels. With "two" also cos and sin of the scaled positions, the least
            scaled first, where reference images (groups other than 0) keep theirs.
        """
        ids = ids.float()  # a scaled position is no whole number
        gain = self.extension.gain(len(ids))
        return tuple(
            table * gain
            for positions in of_tokens(self.axes, ids, _of_image(ids))
            for table in cos_and_sin(self.axes, positions)
        )


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
