"""How much work an image is: floating-point operations, stage by stage."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..families.table import transformer_of
from ..generation.checks import find_window
from ..generation.denoising import passes, text_length
from ..generation.weights import settled

if TYPE_CHECKING:
    from ..generation.request import GenerateRequest


@dataclass(frozen=True)
class StageWork:
    """A stage of an image.

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
    """Plans for the images of one pipeline, of which it reads settings only: from any thread.

    Args:
        pipe: a `CLEARPipeline`.
    """

    def __init__(self, pipe: Any) -> None:
        from ..counting.flops import config_of
        from ..counting.pass_flops import PassFlops

        self._pipe = pipe
        self._scheduler = copy.deepcopy(pipe.scheduler)
        self._token_pixels: int = pipe.token_pixels
        self._text_length = text_length(pipe)
        self._flops = PassFlops.of(
            config_of(transformer_of(pipe, "WorkPlanner")), self._text_length
        )

    def plan(
        self, request: GenerateRequest, image_size: tuple[int, int] | None = None
    ) -> tuple[StageWork, ...]:
        """The stages of a request.

        Args:
            request: for this pipeline.
            image_size: height and width in pixels of the image it enlarges.

        Raises:
            ValueError: the pipeline would refuse it.
        """
        from ..pipelines.cascade.schedule import sigmas_for, static_scheduler
        from ..pipelines.cascade.stages import plan_stages

        strength = request.strength
        stages = plan_stages(
            request.height,
            request.width,
            native_size=self._pipe.native_size,
            token_pixels=self._token_pixels,
            text_length=self._text_length,
            strength=strength[0] if strength and len(strength) == 1 else strength,
            attention="full" if request.attention == "full" else "clear",
            image_size=image_size,
            family=self._pipe.family,
            step=self._pipe.recipe.step,
        )
        far = request.attention != "full" and settled(request).far
        of_step = passes(self._pipe, request.guidance)
        planned = []
        for stage in stages:
            steps = request.steps
            if stage.strength == 0:
                steps = 0
            elif stage.strength is not None:
                scheduler = self._scheduler
                if stage.resolution.shift is not None:
                    scheduler = static_scheduler(scheduler, stage.resolution.shift)
                sigmas = sigmas_for(
                    scheduler,
                    steps,
                    stage.height,
                    stage.width,
                    strength=stage.strength,
                    token_pixels=self._token_pixels,
                    mu=partial(self._pipe.recipe.mu, self._pipe, steps=steps),
                )
                steps = len(sigmas)
            of_pass = self._flops_of_pass(stage.height, stage.width, request, far, stage.attention)
            planned.append(
                StageWork(
                    stage.height, stage.width, stage.attention, steps, steps * of_step * of_pass
                )
            )
        return tuple(planned)

    def _flops_of_pass(
        self, height: int, width: int, request: GenerateRequest, far: bool, attention: str
    ) -> float:
        if attention == "full":
            return self._flops.full(height * width // self._token_pixels**2)
        window = find_window(
            height,
            width,
            request.radius,
            request.down_factor,
            token_pixels=self._token_pixels,
            far=far,
        )
        return self._flops.local(window)
