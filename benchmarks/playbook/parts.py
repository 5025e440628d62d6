"""The parts in the order in which they are worth the time; known without importing anything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A module of this package with `tasks(setting)`.

    Attributes:
        seconds: its share of the whole time, in which its processes start too; what it leaves goes
            to those after it.
        task_seconds: after which a task is given up.
        processes: side by side, where most of the time is compilation.
        quiet: of its rows only what is wrong is printed.
        ahead: a later part that compiles meanwhile, by its `compile_ahead`: of a part that times
            nothing.
    """

    seconds: float
    task_seconds: float
    processes: int = 1
    quiet: bool = False
    ahead: str | None = None


PARTS = {
    "ceilings": Part(30, 15),
    "production": Part(60, 45),
    "sweep": Part(60, 25),
    "counters": Part(60, 50),
    "checks": Part(130, 90, processes=12, quiet=True, ahead="layers"),
    "layers": Part(140, 75),
    "blocks": Part(60, 40),
}
SECONDS = sum(part.seconds for part in PARTS.values())
