"""How far a pipeline is with a picture that ranks share, for their watch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .flux import CLEARFluxPipeline
    from .stages import Stage


class PaintingProgress:
    """A `rank_watch.Progress` that is read off a pipeline: attention layers of a stage.

    Coding and decoding between stages, and stages with full attention, which every rank runs
    whole, do not count.

    Args:
        pipe: with patch parallelism enabled.
    """

    def __init__(self, pipe: CLEARFluxPipeline) -> None:
        self._pipe = pipe
        self._stage: Stage | None = None
        self._layers_before = 0

    def where(self) -> str:
        """The step and the stage, such as "step 3 of 20 of 2048x2048"."""
        stage, scheduler = self._pipe.stage, self._pipe.scheduler
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
