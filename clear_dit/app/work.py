"""How much work a picture is: floating-point operations, stage by stage."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..checks import find_window
from ..denoising import two_passes
from ..models import TOKEN_PIXELS, text_length

if TYPE_CHECKING:
    from ..generate import GenerateRequest


@dataclass(frozen=True)
class StageWork:
    """A stage of a picture.

    Attributes:
        height, width: in pixels.
        attention: "clear" or "full".
        steps: denoising steps of this stage.
        flops: of all of them, guidance's second pass included; of the transformer alone, counted
            as `clear-dit bench plan` does.
    """

    height: int
    width: int
    attention: str
    steps: int
    flops: float


class WorkPlanner:
    """Plans for the pictures of one pipeline, without touching it again: from any thread.

    Args:
        pipe: a `CLEARFluxPipeline`.
    """

    def __init__(self, pipe: Any) -> None:
        self._config = dict(pipe.transformer.config)
        self._scheduler = copy.deepcopy(pipe.scheduler)
        self._native_size: int = pipe.native_size
        self._text_length = text_length(pipe)
        self._two_passes = {scale: two_passes(pipe, scale) for scale in (1.0, 2.0)}
        self._flops_of_pass = lru_cache(maxsize=256)(self._count)

    def plan(
        self, request: GenerateRequest, image_size: tuple[int, int] | None = None
    ) -> tuple[StageWork, ...]:
        """The stages of a request.

        Args:
            request: for this pipeline.
            image_size: height and width in pixels of the picture it enlarges.

        Raises:
            ValueError: the pipeline would refuse it.
        """
        from ..pipelines.schedule import sigmas_for, static_scheduler
        from ..pipelines.stages import plan_stages

        strength = request.strength
        stages = plan_stages(
            request.height,
            request.width,
            native_size=self._native_size,
            token_pixels=TOKEN_PIXELS,
            text_length=self._text_length,
            strength=strength[0] if strength and len(strength) == 1 else strength,
            attention="full" if request.attention == "full" else "clear",
            image_size=image_size,
        )
        passes = 2 if self._two_passes[2.0 if request.guidance > 1 else 1.0] else 1
        planned = []
        for stage in stages:
            steps = request.steps
            if stage.strength is not None:
                scheduler = self._scheduler
                if stage.resolution.shift is not None:
                    scheduler = static_scheduler(scheduler, stage.resolution.shift)
                size = (stage.height, stage.width)
                share = {"strength": stage.strength, "token_pixels": TOKEN_PIXELS}
                steps = (
                    len(sigmas_for(scheduler, request.steps, *size, **share))
                    if stage.strength
                    else 0
                )
            of_pass = self._flops_of_pass(
                stage.height, stage.width, request.radius, request.down_factor, stage.attention
            )
            planned.append(
                StageWork(
                    stage.height, stage.width, stage.attention, steps, steps * passes * of_pass
                )
            )
        return tuple(planned)

    def _count(
        self, height: int, width: int, radius: int, down_factor: int, attention: str
    ) -> float:
        from ..bench.plan import count_flops

        # Of a small stage a pooling cell may be larger than the grid; then full attention runs.
        down_factor = 1 if attention == "full" else down_factor
        window = find_window(height, width, radius, down_factor, self._text_length)
        rows = count_flops(self._config, window)["rows"]
        total: float = next(row["total_tflop"] for row in rows if row["attention"] == attention)
        return total * 1e12
