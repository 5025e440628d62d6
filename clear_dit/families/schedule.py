"""Schedule files: a model's radii by layer and noise level, as `clear-dit calibrate` finds them.

Small JSON that names the model it is for, and refuses another; see docs/flux.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..attention.radii import DENSE, ByLevel, Radii
from ..files import whole_file
from ..kernels.numbers import as_integer, as_number, shown
from ..kernels.window import EVERYTHING
from .table import family_of, head_dim_of, heads_of

FORMAT, VERSION = "clear-dit schedule", 1
# Bounds of a file: FLUX.2-dev has 56 layers.
MAX_BYTES, MAX_LAYERS, MAX_LEVELS, MAX_RADIUS = 2**20, 4096, 64, 2**16
KEYS = ("format", "version", "model", "heads", "head_dim", "radius", "far", "levels", "layers")


@dataclass(frozen=True)
class Schedule:
    """Radii of a model's layers, and how they were found.

    Attributes:
        model: class of the transformer.
        heads, head_dim: of its layers.
        radius: of the uniform window that takes as many FLOPs, in tokens; also of a ControlNet.
        far: whether it is for far keys.
        levels: noise levels that part the intervals, falling; see `Radii`.
        layers: every layer's name and radii in tokens, one for each interval.
        made: how, for people.
    """

    model: str
    heads: int
    head_dim: int
    radius: int
    far: bool
    levels: tuple[float, ...]
    layers: tuple[tuple[str, ByLevel], ...]
    made: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def radii(self) -> Radii:
        """As a processor takes them."""
        return Radii(self.radius, self.levels, self.layers)

    @property
    def digest(self) -> str:
        """A short name of what it does to images."""
        content = self.as_json()
        del content["made"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Any]:
        """What a file holds."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "radius": self.radius,
            "far": self.far,
            "levels": list(self.levels),
            "layers": {
                name: [DENSE if radius == EVERYTHING else radius for radius in radii]
                for name, radii in self.layers
            },
            "made": dict(self.made),
        }

    def check_model(self, who: str, model: nn.Module) -> None:
        """Refuse another model than the schedule's.

        Raises:
            ValueError: its class, its heads or its layers differ.
        """
        layers = family_of(model).layers(model)
        first = next(iter(layers.values()))
        mine = self.model, self.heads, self.head_dim
        its = type(model).__name__, heads_of(first), head_dim_of(model)
        if mine != its:
            raise ValueError(
                f"{who}: the schedule is for a {self.model} of {self.heads} x {self.head_dim} "
                f"channels, but this is a {its[0]} of {its[1]} x {its[2]}; calibrate this model."
            )
        self.radii.check_layers(who, layers)


def schedule_for(
    model: nn.Module, radii: Radii, far: bool, made: Mapping[str, Any] | None = None
) -> Schedule:
    """A schedule of a model's own layers, with these radii."""
    layers = family_of(model).layers(model)
    return Schedule(
        type(model).__name__,
        heads_of(next(iter(layers.values()))),
        head_dim_of(model),
        radii.base,
        far,
        radii.levels,
        tuple((name, radii.of_layer(name)) for name in layers),
        made or {},
    )


def write_schedule(schedule: Schedule, path: Path) -> None:
    """Write a schedule, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as file:
        file.write((json.dumps(schedule.as_json(), indent=1) + "\n").encode())


def read_schedule(path: str | os.PathLike[str], who: str = "schedule") -> Schedule:
    """The schedule in a file.

    Raises:
        ValueError: it is too large, no JSON, or not what a schedule file holds.
        OSError: it cannot be read.
    """
    who = f"{who} {path}"
    with open(path, "rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"{who}: a schedule has at most {MAX_BYTES:,} bytes, this file has more.")
    try:
        found = json.loads(text.decode(), parse_constant=_refused, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{who}: is not JSON ({reason[:100]}); make one with clear-dit calibrate."
        ) from None
    return _Reader(who).read(found)


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is there twice")
    return dict(pairs)


class _Reader:
    """Checks what a file holds, key by key."""

    def __init__(self, who: str) -> None:
        self._who = who

    def read(self, found: Any) -> Schedule:
        """The schedule."""
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(
                f"{self._who}: is no schedule (its format is not {FORMAT!r}); make one with "
                "clear-dit calibrate."
            )
        if found.get("version") != VERSION:
            raise ValueError(
                f"{self._who}: has version {shown(found.get('version'))}, this program reads "
                f"{VERSION}; calibrate again, or update clear-dit."
            )
        wrong = sorted(set(KEYS) ^ (found.keys() - {"made"}))
        if wrong:
            what = "is unknown" if wrong[0] in found else "is missing"
            raise ValueError(f"{self._who}: the key {shown(wrong[0])} {what}.")
        far = self._take(found, "far", lambda x: isinstance(x, bool), "true or false")
        least = 2 if far else 1
        levels = self._levels(found["levels"])
        number = len(levels) + 1
        layers = found["layers"]
        if not isinstance(layers, dict) or not 1 <= len(layers) <= MAX_LAYERS:
            raise ValueError(f"{self._who}: layers must name 1 to {MAX_LAYERS} layers.")
        made = found.get("made", {})
        if not isinstance(made, dict):
            raise ValueError(f"{self._who}: made must be an object, got {shown(made)}.")
        return Schedule(
            self._take(found, "model", lambda x: isinstance(x, str), "text"),
            self._integer("heads", found["heads"], 1, 2**16),
            self._integer("head_dim", found["head_dim"], 1, 2**16),
            self._integer("radius", found["radius"], least, MAX_RADIUS),
            far,
            levels,
            tuple((name, self._radii(name, of, number, least)) for name, of in layers.items()),
            made,
        )

    def _take(self, found: dict[str, Any], key: str, fits: Callable[[Any], bool], rule: str) -> Any:
        if not fits(found[key]):
            raise ValueError(f"{self._who}: {key} must be {rule}, got {shown(found[key])}.")
        return found[key]

    def _integer(self, key: str, value: Any, least: int, most: int) -> int:
        number = None if isinstance(value, (bool, str)) else as_integer(value)
        if number is None or not least <= number <= most:
            raise ValueError(
                f"{self._who}: {key} must be an integer from {least} to {most}, got {shown(value)}."
            )
        return number

    def _levels(self, found: Any) -> tuple[float, ...]:
        numbers = [as_number(each) for each in found] if isinstance(found, list) else [None]
        falling = [1.0 if not place else numbers[place - 1] for place in range(len(numbers))]
        if (
            len(numbers) > MAX_LEVELS
            or not all(
                one is not None and before is not None and 0 < one <= before
                for one, before in zip(numbers, falling, strict=True)
            )
            or len(set(numbers)) < len(numbers)
        ):
            raise ValueError(
                f"{self._who}: levels must be at most {MAX_LEVELS} noise levels from 1 to 0, each "
                f"below the one before; got {shown(found)}."
            )
        return tuple(float(one) for one in numbers if one is not None)

    def _radii(self, name: str, found: Any, number: int, least: int) -> ByLevel:
        if not isinstance(found, list) or len(found) != number:
            raise ValueError(
                f"{self._who}: the layer {shown(name)} must have {number} radii, one for each "
                f"interval of noise levels; got {shown(found)}."
            )
        key = f"radius of {shown(name)}"
        return tuple(
            EVERYTHING if one == DENSE else self._integer(key, one, least, MAX_RADIUS)
            for one in found
        )
