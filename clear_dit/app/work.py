"""How much work an image is: floating-point operations, stage by stage."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..generation.checks import find_window
from ..generation.denoising import passes, text_length
from ..generation.models import TOKEN_PIXELS
from ..generation.weights import settled
from ..kernels.window import Window

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
        self._pipe = pipe
        self._config = dict(pipe.transformer.config)
        self._scheduler = copy.deepcopy(pipe.scheduler)
        self._native_size: int = pipe.native_size
        self._text_length = text_length(pipe)
        self._linear = _linear_flops(self._config, self._text_length)

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
            native_size=self._native_size,
            token_pixels=TOKEN_PIXELS,
            text_length=self._text_length,
            strength=strength[0] if strength and len(strength) == 1 else strength,
            attention="full" if request.attention == "full" else "clear",
            image_size=image_size,
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
                    scheduler, steps, stage.height, stage.width, strength=stage.strength
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
        config = self._config
        layers = config["num_layers"] + config["num_single_layers"]
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        if attention == "full":
            tokens = height * width // TOKEN_PIXELS**2 + self._text_length
            of_layer = 4 * tokens**2 * heads * head_dim
        else:
            window = find_window(
                height,
                width,
                request.radius,
                request.down_factor,
                self._text_length,
                far=far,
            )
            of_layer = window.attention_flops(heads, head_dim)
        start, slope = self._linear
        return start + slope * (height * width // TOKEN_PIXELS**2) + layers * of_layer


def _linear_flops(config: dict[str, Any], text_length: int) -> tuple[float, float]:
    """Of a pass, besides attention: those without an image token, and those of each."""
    from ..bench.plan import count_flops

    one, two = (
        1e12 * count_flops(config, Window(1, tokens, text_length, 1))["rows"][0]["linear_tflop"]
        for tokens in (1, 2)
    )
    return 2 * one - two, two - one
