"""The largest square image that a plan says fits a card, and the flags of `generate` it takes."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..counting.memory import TransformerMemory
from ..errors import RequestError
from ..generation.checks import MAX_SIDE, find_window
from ..generation.placing import OFFLOADS
from ..tables import table
from .configurations import find_configuration
from .plan_memory import OtherParts, check_memory_options, stage_rows

# Of the card: what a plan does not count. CUDA's context and its loaded kernels take about half a
# GiB, the workspaces of products, convolutions and attention as much; 5% are for the allocator's
# fragments and for what a card has less than its name says (80 GB cards 79.1 GiB). Assumed, not
# measured.
RESERVE_GIB, RESERVE_SHARE = 1.0, 0.05
# Sides that are tried, in pixels: multiples.
STEP = 512


def parse_memory(text: str) -> tuple[float, ...]:
    """GiB of cards, with commas between: "24GB", "24GiB" and "24" are the same, as cards are sold.

    Raises:
        RequestError: something else.
    """
    cards = []
    for one in text.split(","):
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:GB|GiB|G)?", one.strip(), re.IGNORECASE)
        if not found or not 0 < float(found[1]) <= 1024:
            raise RequestError(
                f"--fit must be a card's memory, such as 24GB, or several with commas; got "
                f"{text[:100]!r}."
            )
        cards.append(float(found[1]))
    return tuple(cards)


def usable(card_gib: float) -> float:
    """What of a card's memory the tensors of a plan may take, in GiB."""
    return card_gib * (1 - RESERVE_SHARE) - RESERVE_GIB


def fit(
    model: str,
    cards: Sequence[float],
    radius: int,
    far: bool,
    text_length: int | None,
    dtype: torch.dtype,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Try quantisation and offloading, each with sides from the native size up.

    Args:
        model: a name or a folder, see `find_configuration`.
        cards: memory of each, in GiB.
        radius, far, text_length, dtype: see `plan`.
        quantize: the kind to try; int8 where None.

    Returns:
        rows with card_gib, flags, side (pixels; None where not even the native size fits) and
        peak_gib, from what costs least; `best`, of each card the first row with the largest side,
        whose side is None where nothing fits; and the setting.

    Raises:
        RequestError: an unknown model or kind, or a radius that no window has.
    """
    check_memory_options(quantize, "none")
    peaks = _Peaks(model, radius, far, text_length, dtype, quantize or "int8")
    rows = [
        {"card_gib": card, **peaks.row(kind, offload, usable(card))}
        for card in cards
        for offload in OFFLOADS
        for kind in peaks.kinds
    ]
    return {
        "rows": rows,
        "best": [
            max(
                (row for row in rows if row["card_gib"] == card),
                key=lambda row: row["side"] or 0,  # the first of several
            )
            for card in cards
        ],
        "model": model,
        "native_size": peaks.sides[0],
        "radius": radius,
        "far": far,
        "text_length": peaks.text_length,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


class _Peaks:
    """Peak memory of a model's images, each size measured once.

    Attributes:
        kinds: that are tried: None, and one of `quantize`.
        sides: in pixels, that are tried.
    """

    def __init__(
        self,
        model: str,
        radius: int,
        far: bool,
        text_length: int | None,
        dtype: torch.dtype,
        kind: str,
    ) -> None:
        configuration = find_configuration(model)
        self.text_length = configuration.text_length if text_length is None else text_length
        self._window_of = partial(
            find_window,
            radius=radius,
            text_length=self.text_length,
            token_pixels=configuration.token_pixels,
            far=far,
        )
        self.kinds = (None, kind)
        self._parts = {
            each: TransformerMemory(configuration.transformer, dtype, each) for each in self.kinds
        }
        recipe = self._parts[None].recipe
        native = configuration.native_size or recipe.native_size
        unit = math.lcm(STEP, recipe.step * configuration.token_pixels)
        self.sides = [native, *range((native // unit + 1) * unit, MAX_SIDE + 1, unit)]
        whole_tile = self._window_of(self.sides[1], self.sides[1])
        self._others = OtherParts(configuration, whole_tile, dtype)
        self._activations = dict[tuple[str | None, int], float]()

    def row(self, kind: str | None, offload: str, limit: float) -> dict[str, Any]:
        """The largest side with these flags whose peak is within a limit in GiB."""

        def is_too_large(side: int) -> bool:
            return self._peak(kind, offload, side) > limit

        # Sides that fit come before those that do not: memory grows with the image.
        fitting = bisect_left(self.sides, True, key=is_too_large)
        side = self.sides[fitting - 1] if fitting else None
        peak = self._peak(kind, offload, side or self.sides[0])
        return {"flags": flags(kind, offload), "side": side, "peak_gib": peak}

    def _peak(self, kind: str | None, offload: str, side: int) -> float:
        """In GiB; of the stages above the native size, the last takes most."""
        if (kind, side) not in self._activations:
            window = self._window_of(side, side)
            try:
                self._activations[kind, side] = self._parts[kind].activations(window)
            except RequestError:  # the model has no positions for it
                self._activations[kind, side] = math.inf
        denoising = [("denoising", self._activations[kind, side])]
        rows = stage_rows(self._others, self._parts[kind], denoising, offload)
        return max(row["total_gib"] for row in rows)


def flags(quantize: str | None, offload: str) -> str:
    """Of `clear-dit generate`; none where the model is on the device as it is."""
    found = [] if quantize is None else [f"--quantize {quantize}"]
    return " ".join(found + ([] if offload == "none" else [f"--offload {offload}"]))


def report(result: dict[str, Any]) -> str:
    """The tables: all that was tried, and of each card the largest image."""
    rows = [
        {
            "card": f"{row['card_gib']:g} GB",
            "flags": row["flags"] or "none",
            "largest image": _size(row),
            "peak GiB": f"{row['peak_gib']:.1f}",
        }
        for row in result["rows"]
    ]
    sees = ", far keys" if result["far"] else ""
    best = "\n".join(f"{row['card_gib']:g} GB: {_size(row, True)}" for row in result["best"])
    return f"""\
{result["model"]}, radius {result["radius"]} tokens{sees}, {result["dtype"]}
{table(rows)}
Sides are multiples of {STEP} px, up to {MAX_SIDE}; peaks are those of the image, or where none fits
of {result["native_size"]} px. Of a card {RESERVE_GIB:g} GiB are left for CUDA and workspaces, and \
{RESERVE_SHARE:.0%} for fragments.

The largest, and flags of clear-dit generate:
{best}"""


def _size(row: dict[str, Any], as_flags: bool = False) -> str:
    side = row["side"]
    if side is None:
        return "none"
    if not as_flags:
        return f"{side} x {side} px"
    return f"--height {side} --width {side} {row['flags']}".rstrip()
