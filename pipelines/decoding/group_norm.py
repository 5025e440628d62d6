"""GroupNorm with the statistics of a whole image, where only a tile of it is at hand.

Statistics taken tile by tile give every tile a tone of its own. Here those of one layer after the
other are measured over all tiles, with the layers before it normalised by what was measured for
them: what comes out is what the whole image would give, but for rounding. Measuring all layers in
one sweep with estimates, and repeating that, does not converge: a deep network amplifies the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from clear_dit.process_group import RankGroup

from .tiles import Box, Segment, output_box, run_tile, side_before, tile_rows, whole

# Channels whose float32 copy is made at once for their statistics.
_CHANNELS_AT_ONCE = 16


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each group of a layer over some pixels.

    Attributes:
        count: values in a group.
        mean, variance: (groups,), float64, on the CPU; the variance is the biased one.
    """

    count: int
    mean: torch.Tensor
    variance: torch.Tensor

    @classmethod
    def of(cls, hidden: torch.Tensor, groups: int) -> Moments:
        """Of (1, channels, height, width)."""
        group = hidden.shape[1] // groups
        parts = [
            torch.var_mean(part.float().unflatten(1, (-1, group)), dim=(0, 2, 3, 4), correction=0)
            for part in hidden.split(max(_CHANNELS_AT_ONCE // group, 1) * group, dim=1)
        ]
        variance, mean = (torch.cat(part).cpu().double() for part in zip(*parts, strict=True))
        return cls(group * hidden[0, 0].numel(), mean, variance)

    def merged(self, other: Moments) -> Moments:
        """Of both sets of pixels together (Chan, Golub and LeVeque 1983, equation 2.1)."""
        count = self.count + other.count
        share = other.count / count
        step = other.mean - self.mean
        return Moments(
            count,
            self.mean + share * step,
            (1 - share) * self.variance + share * other.variance + share * (1 - share) * step**2,
        )


class _Reached(Exception):  # noqa: N818 (a signal that ends a run)
    """Carries the moments that were asked for."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments


class SharedGroupNorm(TorchFunctionMode):
    """While active, the group norms of a network use given statistics; nothing of it is changed.

    For one run over one tile: the layers are told apart by the order in which they run.

    Args:
        given: of each layer, in that order.
        core: where the layer after those given is to be measured, in pixels of its input; reaching
            it ends the run. None if all are given.
    """

    def __init__(self, given: Sequence[Moments], core: Box | None = None) -> None:
        super().__init__()
        self._given = given
        self._core = core
        self._layer = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        run = self._group_norm if func is F.group_norm else func
        return run(*args, **(kwargs or {}))

    def _group_norm(
        self,
        hidden: torch.Tensor,
        num_groups: int,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        if self._layer == len(self._given):
            assert self._core is not None
            raise _Reached(Moments.of(self._core.of(hidden), num_groups))
        moments = self._given[self._layer]
        self._layer += 1
        mean, variance = (
            part.to(hidden.device, torch.float32).repeat_interleave(hidden.shape[1] // num_groups)
            for part in (moments.mean, moments.variance)
        )
        # To normalise by given statistics is what batch norm does outside training.
        return F.batch_norm(
            hidden, mean, variance, weight.float(), bias.float(), training=False, eps=eps
        )


def measure(
    segments: Sequence[Segment], image: torch.Tensor, tile: int, process_group: RankGroup
) -> list[Moments]:
    """The statistics of every group norm of a network over the whole of an image, exactly.

    One pass over all tiles for each layer, as far into the network as that layer. The tiles are
    merged in the same order however many ranks share them out: the result is the same bit for bit.

    Args:
        segments: the network.
        image: its whole input, (1, channels, height, width).
        tile: side of a tile, in output pixels.
        process_group: the ranks that share out the tiles.
    """
    found: list[Moments] = []
    for index, segment in enumerate(segments):
        before = segments[:index]
        limit = output_box(before, whole(image))
        side = side_before(segments[index:], tile)
        for _ in range(segment.norms):
            found.append(_measure_next(before, segment, image, limit, side, found, process_group))
    return found


def _measure_next(
    before: Sequence[Segment],
    segment: Segment,
    image: torch.Tensor,
    limit: Box,
    side: int,
    found: Sequence[Moments],
    process_group: RankGroup,
) -> Moments:
    cores = [core for row in tile_rows(limit, side) for core in row]
    own: list[tuple[int, list[float], list[float]]] = []
    for core in process_group.share(cores):
        given = core.grown(segment.reach, segment.down, limit)
        try:
            with SharedGroupNorm(found, core.within(given)):
                segment.run(run_tile(before, image, given))
        except _Reached as reached:
            part = reached.moments
            own.append((part.count, part.mean.tolist(), part.variance.tolist()))
    parts = [
        Moments(
            count,
            torch.tensor(mean, dtype=torch.float64),
            torch.tensor(variance, dtype=torch.float64),
        )
        for count, mean, variance in process_group.in_order(own, len(cores))
    ]
    return reduce(Moments.merged, parts)
