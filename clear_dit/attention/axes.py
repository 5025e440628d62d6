"""Axes of rotary position tables: from positions to angles, by every method of extension.

A rotary table turns the position p of a token along an axis into angles p * frequency, one for
every pair of channels. Most methods are a change of those frequencies; "two" has further positions
besides. Families make their tables of these parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
class Axis:
    """One axis of a rotary table: turns positions into angles.

    Attributes:
        theta: base of the model's frequencies.
        dim: channels, two to an angle.
        method: see `Extension`.
        factor: see `Extension.rope_factors`.
        trained_side: extent the model was trained at, in positions.
        margin: what "two" leaves free at both ends of it, in positions.
    """

    theta: float
    dim: int
    method: str = "none"
    factor: float = 1.0
    trained_side: float = 64
    margin: float = MARGIN

    def frequencies(
        self, dtype: torch.dtype = torch.float64, device: torch.device | None = None
    ) -> torch.Tensor:
        """Radians per position for every pair of channels, (dim / 2,)."""
        theta = self.theta * self.factor if self.method == "ntk" else self.theta
        exponents = torch.arange(0, self.dim, 2, dtype=dtype, device=device)
        frequencies = 1.0 / theta ** (exponents / self.dim)
        if self.method == "interpolation":
            return frequencies / self.factor
        if self.method == "yarn" and self.factor != 1:
            turns = self.trained_side * frequencies / (2 * math.pi)
            kept = ((turns - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0, 1)
            return kept * frequencies + (1 - kept) * frequencies / self.factor
        return frequencies

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Radians, (tokens, dim / 2).

        Args:
            positions: (tokens,).
            dtype: of the frequencies; the angles' is at least that of the positions.
        """
        return torch.outer(positions, self.frequencies(dtype, positions.device))

    def scaled(self, positions: torch.Tensor, factor: float) -> torch.Tensor:
        """Positions of an image by one of the factors of "two"."""
        return positions if self.factor == 1 else positions / factor + self.margin


def along_axes(axes: Sequence[Axis], positions: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Positions of an image's tokens along every axis: true, and with "two" scaled ones.

    Args:
        positions: one tensor for every axis, (tokens on it,).

    Returns:
        Such lists: the true positions, then the least scaled first, the most scaled last.
    """
    return [
        list(positions),
        *(
            [axis.scaled(one, by) for axis, one, by in zip(axes, positions, factors, strict=True)]
            for factors in octaves(axes)
        ),
    ]


def of_tokens(
    axes: Sequence[Axis], ids: torch.Tensor, of_image: torch.Tensor
) -> list[torch.Tensor]:
    """`along_axes` for tokens that each have a position on every axis.

    Args:
        ids: (tokens, axes), floating point.
        of_image: (tokens, 1) bool; tokens of which "two" scales the positions.
    """
    _, *scaled = along_axes(axes, ids.unbind(dim=1))
    return [ids, *(torch.where(of_image, torch.stack(each, dim=1), ids) for each in scaled)]


def angles_along(
    axes: Sequence[Axis], positions: Sequence[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """`Axis.angles` of every axis, (tokens, its dim / 2) each.

    Args:
        positions: one tensor for every axis, (tokens,).
        dtype: see `Axis.angles`.
    """
    return [axis.angles(one, dtype) for axis, one in zip(axes, positions, strict=True)]


def cos_and_sin(axes: Sequence[Axis], positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FLUX's table, (tokens, sum of the axes' channels) each, float32.

    Every angle is in two neighbouring channels.

    Args:
        positions: (tokens, axes), float32.
    """
    dtype = table_dtype(positions.device)
    return of_angles(torch.cat(angles_along(axes, positions.unbind(dim=1), dtype), dim=1))


def of_angles(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`cos_and_sin` from angles, (tokens, sum of the axes' channels / 2)."""
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos().float(), angles.sin().float()


def over_grid(tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """A table of a grid's tokens in raster order, (tokens, sum of channels).

    Args:
        tables: of every axis, (positions on it, channels).
    """
    sizes = [len(table) for table in tables]
    spread = (
        table.view(*(-1 if place == axis else 1 for place in range(len(tables))), table.shape[1])
        for axis, table in enumerate(tables)
    )
    return torch.cat([table.expand(*sizes, -1) for table in spread], dim=-1).flatten(0, -2)


def table_dtype(device: torch.device) -> torch.dtype:
    """In which angles are calculated where the model does so in float64."""
    return torch.float32 if device.type in FLOAT32_DEVICES else torch.float64


def octaves(axes: Sequence[Axis]) -> list[tuple[float, ...]]:
    """The factors of "two", reached in steps of some 2; none with other methods."""
    factors = tuple(axis.factor for axis in axes)
    if all(axis.method != "two" for axis in axes):
        return []
    largest = max(factors)
    steps = max(1, round(math.log2(largest)))
    return [
        *(
            tuple(min(factor, largest ** (step / steps)) for factor in factors)
            for step in range(1, steps)
        ),
        factors,
    ]
