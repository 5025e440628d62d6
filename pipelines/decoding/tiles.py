"""Running a network tile by tile, each tile with just the surroundings that its pixels depend on.

A network is a list of segments. For a tile of the output every segment is asked, from the last to
the first, which part of its input it needs; then the parts are computed from the first to the last,
each cropped to what the next one needs. The halo of a tile thus shrinks segment by segment, and
where it meets the image's border the network pads as it does without tiles: the result is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segment:
    """A part of a network that maps (1, channels, height, width) to another size and channels.

    Attributes:
        run: the part itself; beyond its input it pads as the network does at an image's border.
        reach: how far an output pixel looks beyond the input pixels it covers, in input pixels.
        up, down: factors on height and width; one of them is 1.
        norms: number of group norms in it, all on images of its input's size.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    reach: int = 0
    up: int = 1
    down: int = 1
    norms: int = 0


@dataclass(frozen=True)
class Box:
    """Rows top to bottom and columns left to right (exclusive) of an image, in its pixels."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, image: torch.Tensor) -> torch.Tensor:
        """This part of an image (..., height, width), a view."""
        return image[..., self.top : self.bottom, self.left : self.right]

    def within(self, outer: Box) -> Box:
        """The same part, counted from the corner of a box around it."""
        return Box(
            self.top - outer.top,
            self.bottom - outer.top,
            self.left - outer.left,
            self.right - outer.left,
        )

    def scaled(self, up: int, down: int) -> Box:
        """In an image that is up / down times as large; pixels it covers in part count whole."""
        return Box(
            self.top * up // down,
            -(-self.bottom * up // down),
            self.left * up // down,
            -(-self.right * up // down),
        )

    def grown(self, reach: int, step: int, limit: Box) -> Box:
        """With `reach` pixels more on every side, out to multiples of `step`, within `limit`."""
        return Box(
            max((self.top - reach) // step * step, limit.top),
            min(-(-(self.bottom + reach) // step) * step, limit.bottom),
            max((self.left - reach) // step * step, limit.left),
            min(-(-(self.right + reach) // step) * step, limit.right),
        )


def whole(image: torch.Tensor) -> Box:
    """All of an image (..., height, width)."""
    return Box(0, image.shape[-2], 0, image.shape[-1])


def tile_rows(image: Box, tile: int) -> Iterator[list[Box]]:
    """The tiles of an image, one row of tiles after the other.

    Args:
        image: the whole.
        tile: height and width of a tile, in pixels; the last ones may be smaller.
    """
    for top in range(image.top, image.bottom, tile):
        bottom = min(top + tile, image.bottom)
        yield [
            Box(top, bottom, left, min(left + tile, image.right))
            for left in range(image.left, image.right, tile)
        ]


def output_box(segments: Sequence[Segment], image: Box) -> Box:
    """All of what a network makes of an image."""
    for segment in segments:
        image = image.scaled(segment.up, segment.down)
    return image


def sees_everything(segments: Sequence[Segment], image: Box) -> bool:
    """Whether a segment looks as far as its whole input, so that a tile would save nothing."""
    for segment in segments:
        if segment.reach >= max(image.bottom, image.right):
            return True
        image = image.scaled(segment.up, segment.down)
    return False


def side_before(segments: Sequence[Segment], side: int) -> int:
    """What a side in a network's output pixels is in its input pixels."""
    for segment in segments:
        side = side * segment.down // segment.up
    return side


def needed_boxes(segments: Sequence[Segment], image: Box, tile: Box) -> list[Box]:
    """What a tile needs of the input of every segment, and last the tile itself.

    Args:
        segments: the network.
        image: its whole input.
        tile: the part wanted, in output pixels.
    """
    limits = [image]
    for segment in segments[:-1]:
        limits.append(limits[-1].scaled(segment.up, segment.down))
    needed = [tile]
    for segment, limit in zip(reversed(segments), reversed(limits), strict=True):
        covered = needed[-1].scaled(segment.down, segment.up)
        needed.append(covered.grown(segment.reach, segment.down, limit))
    return needed[::-1]


def run_tile(segments: Sequence[Segment], image: torch.Tensor, tile: Box) -> torch.Tensor:
    """A part of a network's output, as if the whole had been computed.

    Args:
        segments: the network, at least one.
        image: its whole input, (1, channels, height, width).
        tile: the part wanted, in output pixels.

    Returns:
        (1, channels, rows, columns) of the tile.
    """
    needed = needed_boxes(segments, whole(image), tile)
    hidden = needed[0].of(image)
    for segment, given, wanted in zip(segments, needed, needed[1:], strict=False):
        made = given.scaled(segment.up, segment.down)
        hidden = wanted.within(made).of(segment.run(hidden))
    return hidden
