"""Which key tiles the two groups of a program visit: the union, and each group's part of it.

As in ..geometry, the lists depend on the classes of borders only: kilobytes at any resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..geometry import Tiling, visits
from ..resident import resident

SIDE = 8
TILING = Tiling(SIDE, 2 * SIDE, SIDE, SIDE)
DISC, BORDER = 1, 2
# Between one tile of a group and its next in the stream there is at most one that it passes over.
WIDEST_STEP = 2
# Places and offsets are int16.
LARGEST = 2**15 - 1


@dataclass(frozen=True)
class PairedVisits:
    """The lists of a grid, as tensors on one device.

    Attributes:
        offsets: int16 (n, 2), rows and columns from the program's first token to the tile's first,
            in the order of loading.
        lists: int64 (m,), four int16 each, the lowest first: place of a tile in the union, its
            offsets, what hides keys of it from the group (DISC, BORDER).
        ranges: int32 (row classes, column classes, 6), where the union begins and ends in
            `offsets`, and each group's part in `lists`.
        row_class, column_class: int32, class of every row, and every column, of programs' tiles.
    """

    offsets: torch.Tensor
    lists: torch.Tensor
    ranges: torch.Tensor
    row_class: torch.Tensor
    column_class: torch.Tensor


def _squares(own: range, first: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest squared distance on an axis between own tokens and a tile's real ones."""
    low, high = np.maximum(first, 0), np.minimum(first + SIDE, length) - 1
    least = np.maximum(0, np.maximum(low - (own.stop - 1), own.start - high))
    largest = np.maximum(abs(high - own.start), abs(own.stop - 1 - low))
    return least**2, largest**2


def _hidden_by(
    rows: range, columns: range, tiles: np.ndarray, size: tuple[int, int], radius: int
) -> np.ndarray:
    """What hides keys of every tile from the tokens of rows x columns; -1 where all are hidden."""
    (near_y, far_y), (near_x, far_x) = (
        _squares(own, tiles[:, axis], length)
        for axis, (own, length) in enumerate(zip((rows, columns), size, strict=True))
    )
    whole = np.all((tiles >= 0) & (tiles + SIDE <= np.array(size)), axis=1)
    hidden_by = DISC * (far_y + far_x >= radius**2) + BORDER * ~whole
    return np.where((near_y + near_x < radius**2) & (len(columns) > 0), hidden_by, -1)


def _order(seen: np.ndarray) -> np.ndarray:
    """Of (n, 2) bool, who sees a tile: first what both see, then what one sees, in turns."""
    alone = [np.flatnonzero(seen[:, group] & ~seen[:, 1 - group]) for group in (0, 1)]
    turn = np.concatenate([2 * np.arange(len(tiles)) + group for group, tiles in enumerate(alone)])
    in_turns = np.concatenate(alone)[turn.argsort()]
    return np.concatenate([np.flatnonzero(seen.all(axis=1)), in_turns])


def paired_visits(
    height: int, width: int, radius: int, device: torch.device, owner_rows: tuple[int, int]
) -> PairedVisits:
    """The lists of a grid of height x width tokens for discs of `radius` tokens.

    owner_rows: (start, stop) of the rows that have queries.
    """
    return resident(_paired_visits, (height, width, radius, owner_rows), device)


def _paired_visits(
    height: int, width: int, radius: int, owner_rows: tuple[int, int]
) -> PairedVisits:
    found = visits(height, width, radius, TILING, torch.device("cpu"), owner_rows)
    row_class, column_class = found.row_class.numpy(), found.column_class.numpy()
    row_classes, column_classes, _ = found.ranges.shape
    ranges = np.zeros((row_classes, column_classes, 6), dtype=np.int32)
    unions, parts, begin, part = [], [], 0, 0
    for i in range(row_classes):
        top = owner_rows[0] + SIDE * int((row_class == i).argmax())
        rows = range(top, min(top + SIDE, owner_rows[1]))
        for j in range(column_classes):
            left = 2 * SIDE * int((column_class == j).argmax())
            first, _, last = found.ranges[i, j].tolist()
            offsets = found.offsets[first:last].numpy().astype(np.int64)
            hidden_by = np.stack([
                _hidden_by(
                    rows, range(start, min(start + SIDE, width)),
                    offsets + np.array((top, left)), (height, width), radius,
                )
                for start in (left, left + SIDE)
            ], axis=1)  # fmt: skip
            order = _order(hidden_by >= 0)
            offsets, hidden_by = offsets[order], hidden_by[order]
            unions.append(offsets)
            ranges[i, j, :2] = begin, begin + len(order)
            begin += len(order)
            for group in (0, 1):
                places = np.flatnonzero(hidden_by[:, group] >= 0)
                parts.append(np.column_stack([places, offsets[places], hidden_by[places, group]]))
                ranges[i, j, 2 + 2 * group : 4 + 2 * group] = part, part + len(places)
                part += len(places)
    items = np.concatenate(parts)
    if np.abs(items).max(initial=0) > LARGEST:
        raise ValueError(f"{height} x {width} tokens at radius {radius}: numbers beyond 16 bits")
    lists = np.ascontiguousarray(items.astype(np.int16)).view(np.int64)[:, 0]
    arrays = (np.concatenate(unions).astype(np.int16), lists, ranges, row_class, column_class)
    return PairedVisits(*(torch.from_numpy(array) for array in arrays))
