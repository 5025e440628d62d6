"""Radii by layer and noise level: how far each layer attends, and where it attends to everything.

A full layer is a radius that no image exceeds, `EVERYTHING`: all else follows from the window.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..kernels.numbers import integer, number, shown
from ..kernels.window import EVERYTHING

# A radius as people give it, by name and in files.
DENSE: Literal["dense"] = "dense"
# What a map of radii calls the layers that it does not name.
OTHERS = "*"
# Pipelines round noise levels to the model's dtype, bfloat16's twice: the time, and the level.
ROUNDING = 2**-8
# Radii of one layer, one for each interval of noise levels, the highest first.
ByLevel = tuple[int, ...]


@dataclass(frozen=True)
class Radii:
    """Radius of every layer's window, in tokens, by noise level.

    Attributes:
        base: of layers of which nothing else is said, such as a ControlNet's; at least 1. Where
            tokens have two positions, a full layer scores pairs nearer than this by the true ones.
        levels: noise levels from 1 to 0 that part the intervals, falling: radius i of a layer is
            from levels[i] on, up to the one before; the last one below all of them.
        layers: name of a layer, or "*" for all others, to its radii. Empty where all have `base`.
    """

    base: int
    levels: tuple[float, ...] = ()
    layers: tuple[tuple[str, ByLevel], ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether all layers have the same radius at all noise levels."""
        return not self.layers

    @property
    def all(self) -> frozenset[int]:
        """All radii that occur."""
        return frozenset({self.base}.union(*(radii for _, radii in self.layers)))

    def of_layer(self, name: str) -> ByLevel:
        """Those of a layer, one for each interval; see `check_layers`."""
        found = dict(self.layers)
        return found.get(name) or found.get(OTHERS) or (self.base,) * (len(self.levels) + 1)

    def of_other_model(self) -> Radii:
        """Those of a model whose layers have other names: of the layers that are not named."""
        others = self.of_layer(OTHERS)
        same = len(set(others)) == 1
        return Radii(others[0]) if same else replace(self, layers=((OTHERS, others),))

    def interval(self, level: float) -> int:
        """Which of a layer's radii belongs to a noise level, which may have been rounded."""
        return sum(level < bound * (1 - ROUNDING) for bound in self.levels)

    def check_layers(self, who: str, names: Collection[str]) -> None:
        """Refuse names that a model has no layers of, and layers without a radius.

        Raises:
            ValueError: the first.
        """
        named = dict(self.layers)
        for name in named.keys() - {OTHERS} - set(names):
            raise ValueError(
                f"{who}: the model has no layer {shown(name)}; its {len(names)} layers are "
                f"{_shortly(list(names))}."
            )
        left_out = [] if OTHERS in named or not named else [n for n in names if n not in named]
        if left_out:
            raise ValueError(
                f"{who}: radius names {len(named)} of {len(names)} layers, and not {left_out[0]}; "
                f"name all, or give the others' as {OTHERS!r}."
            )

    def of_one(self, radii: ByLevel) -> str:
        """The radii of one layer in words: "dense/8 from noise levels 0.9 on"."""
        return "/".join(map(_named, radii)) + self._at

    @property
    def _at(self) -> str:
        levels = ", ".join(f"{level:g}" for level in self.levels)
        return f" from noise levels {levels} on" if levels else ""

    def __str__(self) -> str:
        if self.is_plain:
            return str(self.base)
        kinds = dict.fromkeys("/".join(map(_named, radii)) for _, radii in self.layers)
        return f"{', '.join(kinds)} by layer{self._at}"


def take_radii(
    who: str,
    radius: Any,
    dense_layers: Sequence[str] = (),
    dense_until: float | None = None,
) -> Radii:
    """Checked radii of what a caller gives.

    Args:
        who: it is, for messages.
        radius: an int of at least 1, in tokens; a mapping of layers' names to such, "*" for those
            it does not name; or `Radii`.
        dense_layers: names of layers that attend to everything.
        dense_until: from this noise level on, of 0 to 1, all layers do.

    Raises:
        ValueError: out of range, or settings that exclude each other.
    """
    if isinstance(dense_layers, str) or not all(isinstance(name, str) for name in dense_layers):
        raise ValueError(
            f"{who}: dense_layers must be a list of names of layers, got {shown(dense_layers)}."
        )
    if dense_until is not None:
        dense_until = number(f"{who}: dense_until", dense_until, 0, 1)
    if isinstance(radius, Radii):
        if dense_layers or dense_until is not None:
            raise ValueError(
                f"{who}: a schedule says where attention is full; leave dense_layers and "
                "dense_until out."
            )
        return radius
    if isinstance(radius, Mapping):
        if not radius:
            raise ValueError(f"{who}: radius must name a layer, got an empty map.")
        layers = {
            str(name): integer(f"{who}: radius of {shown(name)}", value, 1)
            for name, value in radius.items()
        }
        base = layers.get(OTHERS, min(layers.values()))
    else:
        base, layers = integer(f"{who}: radius", radius, 1), {}
    if not (layers or dense_layers or dense_until is not None):
        return Radii(base)
    if not layers:
        layers[OTHERS] = base
    layers |= dict.fromkeys(dense_layers, EVERYTHING)
    first = () if dense_until is None else (EVERYTHING,)
    return Radii(
        base,
        () if dense_until is None else (dense_until,),
        tuple((name, (*first, value)) for name, value in layers.items()),
    )


def _named(radius: int) -> str:
    return DENSE if radius == EVERYTHING else str(radius)


def _shortly(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, ... {names[-1]}"
