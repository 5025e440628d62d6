"""Every entry of the forward tables for this device, at the production shape; then the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from .entries import chosen_entry, entries, waits
from .parts import CHOSEN
from .production import measure
from .setting import Setting, Task


def tasks(setting: Setting) -> list[Task]:
    """Radius by radius, so that entries can be compared early; then the smallest far window.

    What may hang comes after all else, in a process of its own; then the fastest of what is right.
    """
    size = setting.sizes[-1]
    problems = [(radius, False) for radius in setting.radii] + [(setting.far_radii[0], True)]
    tried = [
        Task(
            f"{entry.name} {'far ' * far}r={radius}",
            partial(measure, setting, size, radius, far, entry.name),
            alone=waits(entry),
        )
        for radius, far in problems
        for entry in entries(setting, far)
    ]
    tried.sort(key=lambda task: task.alone)
    chosen = [
        Task(f"{CHOSEN} r={radius}", partial(_measure_chosen, setting, radius))
        for radius in setting.radii
    ]
    return [*tried, *chosen]


def _measure_chosen(setting: Setting, radius: int) -> Iterator[dict[str, Any]]:
    """Once more: of several, the fastest was fast by chance too."""
    yield from measure(setting, setting.sizes[-1], radius, False, chosen_entry(setting, radius))
