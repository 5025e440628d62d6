"""The parts in the order in which they are worth the time; known without importing anything."""

from __future__ import annotations

from dataclasses import dataclass

# Begins the labels of the sweep's tasks that take the entry which it found right and fastest.
CHOSEN = "as chosen"


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
    "production": Part(100, 45),
    "sweep": Part(80, 25),
    "counters": Part(60, 50),
    "checks": Part(110, 90, processes=12, quiet=True, ahead="layers"),
    "layers": Part(135, 75),
    "blocks": Part(55, 40),
}
SECONDS = sum(part.seconds for part in PARTS.values())
