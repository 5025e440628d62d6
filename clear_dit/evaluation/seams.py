"""Seams: how much steeper an image is across the borders of tiles than beside them.

An image decoded in tiles shows where they meet if each has its own tone or sharpness. Measured is
the mean absolute difference between the two rows (or columns) of pixels at a border, against the
same at lines nearby: 1.0 means that nothing tells the borders from the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import RequestError
from ..generation.image_input import load_pixels, open_image

# A border is compared with lines 8 and 16 pixels away on both sides: near, so that the image is
# alike there, and at the same place in an autoencoder's own pattern of 8 pixels.
_STEP, _STEPS = 8, 2
# Added to both sides of a ratio, in grey levels out of 255: two flat places are alike.
_FLOOR = 0.01
_STRIP = 256


@dataclass(frozen=True)
class Seams:
    """The seam metric of an image.

    Attributes:
        ratio: mean gradient across all borders by that at lines nearby; 1.0 for no seams.
        rows, columns: the same for horizontal and for vertical borders alone; None without any.
        worst: the largest ratio of a single border, which is above 1 by chance too.
        worst_at: where that is, as ("row" or "column", pixel).
    """

    ratio: float
    rows: float | None
    columns: float | None
    worst: float
    worst_at: tuple[str, int]


def measure_seams(image: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> Seams:
    """The seam metric of an image in memory.

    Args:
        image: (height, width) or (height, width, channels), in grey levels from 0 to 255; any
            dtype.
        rows, columns: the first row or column of pixels beyond each border.

    Raises:
        ValueError: no border, or one outside the image.
    """
    return seams_of_profiles(*gradient_profiles([image]), rows, columns)


def gradient_profiles(strips: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean absolute differences between neighbouring rows and columns of an image.

    Args:
        strips: (rows, width) or (rows, width, channels) from top to bottom, in grey levels.

    Returns:
        (height,) and (width,) in grey levels: item i is between i - 1 and i; item 0 is 0.
    """
    by_row: list[np.ndarray] = []
    by_column: np.ndarray | float = 0.0
    above: np.ndarray | None = None
    height = 0
    for strip in strips:
        values = np.asarray(strip, dtype=np.float32).reshape(*strip.shape[:2], -1)
        down = np.diff(values, axis=0, prepend=values[:1] if above is None else above)
        by_row.append(np.abs(down).mean(axis=(1, 2)))
        across = np.diff(values, axis=1, prepend=values[:, :1])
        by_column = by_column + np.abs(across).mean(axis=2).sum(axis=0, dtype=np.float64)
        above = values[-1:]
        height += len(values)
    return np.concatenate(by_row), np.asarray(by_column) / height


def seams_of_profiles(
    by_row: np.ndarray, by_column: np.ndarray, rows: Sequence[int], columns: Sequence[int]
) -> Seams:
    """The seam metric from `gradient_profiles`; arguments and errors as in `measure_seams`."""
    found = {
        "row": _border_gradients(by_row, rows, "row"),
        "column": _border_gradients(by_column, columns, "column"),
    }
    if not rows and not columns:
        raise ValueError("seams: there is no border to measure; name a row or a column.")
    ratios = {
        (name, place): _ratio([pair])
        for name, pairs in found.items()
        for place, pair in pairs.items()
    }
    worst_at = max(ratios, key=ratios.__getitem__)
    of_rows, of_columns = (list(pairs.values()) for pairs in found.values())
    return Seams(
        ratio=_ratio([*of_rows, *of_columns]),
        rows=_ratio(of_rows) if of_rows else None,
        columns=_ratio(of_columns) if of_columns else None,
        worst=ratios[worst_at],
        worst_at=worst_at,
    )


def _border_gradients(
    profile: np.ndarray, borders: Sequence[int], name: str
) -> dict[int, tuple[float, float]]:
    """Of each border, the gradient across it and the mean of those at the lines nearby."""
    gradients = {}
    for border in borders:
        if not 0 < border < len(profile):
            raise ValueError(
                f"seams: a border must be a {name} from 1 to {len(profile) - 1}, got {border}."
            )
        offsets = (sign * step * _STEP for step in range(1, _STEPS + 1) for sign in (-1, 1))
        lines = {border + offset for offset in offsets} - set(borders)
        beside = [profile[line] for line in lines if 0 < line < len(profile)]
        if not beside:
            raise ValueError(
                f"seams: {name} {border} has no line beside it to compare with; borders must be "
                f"at least {2 * _STEP} pixels apart."
            )
        gradients[border] = float(profile[border]), float(np.mean(beside))
    return gradients


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    across, beside = np.mean(pairs, axis=0) + _FLOOR
    return float(across / beside)


def seams_of_file(path: Path, tile: int) -> dict[str, Any]:
    """The seam metric of an image file whose tiles start at its upper left corner.

    Args:
        path: in a format that Pillow reads, up to 16384 x 16384 pixels.
        tile: side of a tile, in pixels.

    Returns:
        The fields of `Seams`, with image, height, width and tile.

    Raises:
        RequestError: not an image, or too large; a tile out of range, or with no border in it.
    """
    with open_image(path) as image:
        load_pixels(image, str(path))
        width, height = image.size
        rows, columns = range(tile, height, tile), range(tile, width, tile)
        longest = max(height, width)
        if tile < 2 * _STEP or tile >= longest:
            raise RequestError(
                f"--tile must be from {2 * _STEP} to {longest - 1} pixels, below the longer side "
                f"of the image ({width} x {height}), got {tile}."
            )
        profiles = gradient_profiles(_strips(image))
    found = seams_of_profiles(*profiles, rows, columns)
    return {"image": str(path), "height": height, "width": width, "tile": tile, **asdict(found)}


def report(result: dict[str, Any]) -> str:
    """What `seams_of_file` found, for people."""
    kind, place = result["worst_at"]
    return (
        f"{result['image']}: seam metric {result['ratio']:.3f} at tiles of {result['tile']} px "
        f"(1.000 is none); worst {result['worst']:.3f} at {kind} {place}"
    )


def _strips(image: Image.Image) -> Iterator[np.ndarray]:
    for top in range(0, image.height, _STRIP):
        box = (0, top, image.width, min(top + _STRIP, image.height))
        # Not `crop`, which holds the size against Pillow's own bound.
        strip = image.resize((image.width, box[3] - top), Image.Resampling.NEAREST, box)
        yield np.asarray(strip.convert("RGB"))
