"""How far a rank is with its work, for the watch of all ranks, and whether it hangs."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any, Protocol

from ..cascade.stages import Stage
from .patch_parallel import PatchParallel

# A rank hangs that takes so many times longer than usual, but for so many seconds at least; before
# the usual is known (compilation, first use of a device), so many.
_HANG_FACTOR, _HANG_LEAST, _HANG_UNKNOWN = 10, 40.0, 1800.0
_USUAL_FROM = 8


class Followed(Protocol):
    """A pipeline whose work can be followed, such as `CLEARFluxPipeline`."""

    @property
    def latest_call(self) -> Any: ...

    @property
    def stage(self) -> Stage | None: ...

    @property
    def patch_parallel(self) -> PatchParallel | None: ...


class Progress:
    """How far a rank is, written by its work and read by its watch.

    Args:
        where: what it is doing, such as "step 3 of 20".

    Attributes:
        count: of what it has done; any unit that takes about equally long.
        waiting: whether it waits for other ranks.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self.count = 0
        self.waiting = False

    def where(self) -> str:
        """What this rank is doing."""
        return self._where


class GenerationProgress:
    """A `Progress` that is read off a pipeline: attention layers of a stage.

    Coding and decoding between stages, and stages with full attention, which every rank runs
    whole, do not count.

    Args:
        pipe: with patch parallelism enabled.
    """

    def __init__(self, pipe: Followed) -> None:
        self._pipe = pipe
        self._stage: Stage | None = None
        self._layers_before = 0

    def where(self) -> str:
        """The step and the stage, such as "step 3 of 20 of 2048x2048"."""
        call = self._pipe.latest_call
        stage, scheduler = call.stage, call.scheduler
        if stage is None:
            return "the work before or after its steps"
        steps = len(scheduler.timesteps)
        return f"step {min((scheduler.step_index or 0) + 1, steps)} of {steps} of {stage.name}"

    @property
    def count(self) -> int:
        """Attention layers computed in this stage."""
        patches = self._pipe.patch_parallel
        layers = 0 if patches is None else patches.traffic.layers
        if self._pipe.stage is not self._stage:
            self._stage, self._layers_before = self._pipe.stage, layers
        return 0 if self._stage is None else layers - self._layers_before

    @property
    def waiting(self) -> bool:
        """Whether this process waits for what another sends."""
        patches = self._pipe.patch_parallel
        return patches is not None and patches.traffic.waiting


class HangDetector:
    """Whether work that goes on in steps of about equal length has stopped.

    Args:
        limit: seconds without progress that are too many; None to go by what is usual.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._seconds: deque[float] = deque(maxlen=50)
        self._count = 0
        self._since = 0.0

    def overdue(self, count: int, waiting: bool, now: float) -> float | None:
        """Seconds without progress, if too many; work that has not begun is not judged.

        Args:
            count: see `Progress`.
            waiting: then others have the time they may take, too, before this rank is to blame.
            now: a clock, in seconds.
        """
        if count < self._count:
            self._seconds.clear()
        elif 0 < self._count < count:
            self._seconds.append((now - self._since) / (count - self._count))
        if count != self._count:
            self._count, self._since = count, now
        limit = self._limit
        if limit is None:
            limit = _HANG_UNKNOWN
            if len(self._seconds) >= _USUAL_FROM:
                limit = max(_HANG_LEAST, _HANG_FACTOR * statistics.median(self._seconds))
        passed = now - self._since
        return passed if self._count and passed > (1.5 if waiting else 1) * limit else None
