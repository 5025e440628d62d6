"""What an image will take, stage by stage: by configuration files, before a model is loaded."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..tables import number, table
from .checks import find_dtype, find_window
from .denoising import passes, text_length
from .image_input import read_image
from .models import Model, find_model, quiet_libraries
from .weights import settled

if TYPE_CHECKING:
    from ..counting.memory import TransformerMemory
    from ..counting.pass_flops import PassFlops
    from ..kernels.window import Window
    from ..pipelines.cascade.stages import Stage
    from .request import GenerateRequest

# Windows of which it is kept what a step takes.
_MAX_REMEMBERED = 1000
TOKENIZER_CONFIG, SCHEDULER_CONFIG = "tokenizer_config.json", "scheduler_config.json"


class UnguidedError(RequestError):
    """A negative prompt where no stage has guidance."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of an image.

    Attributes:
        height, width: in pixels.
        strength: the noise level it starts at; None from noise alone.
        steps: denoising steps of this stage.
        passes: forwards of the transformer in a step.
        attention: "clear" or "full".
        flops: of all its forwards; of the transformer alone, counted as `clear-dit bench plan`
            does.
    """

    height: int
    width: int
    strength: float | None
    steps: int
    passes: int
    attention: str
    flops: float

    @property
    def name(self) -> str:
        """Its size: "1024x768", width first."""
        return f"{self.width}x{self.height}"


class StagePlanner:
    """Plans images of one model, by its configuration files: from any thread.

    Args:
        model: see `GenerateRequest`.

    Raises:
        RequestError: see `find_model`.
    """

    def __init__(self, model: str) -> None:
        found = find_model(model)
        self._pipe = described(found)
        self._pipe.scheduler = _scheduler(found)
        self._text_length = text_length(self._pipe)
        self._transformer = found.index.config("transformer")

        self._memories: dict[tuple[str, str | None], TransformerMemory] = {}
        self._activations: dict[tuple[object, ...], int] = {}
        self._counting = threading.Lock()

    def prepare(self, request: GenerateRequest) -> None:
        """Count what plans of requests like this one need, once, now.

        Models without weights are built for it, under another default dtype: a process that
        generates on another thread does it before.
        """
        self.memory(request, self.plan(request))

    @cached_property
    def _flops(self) -> PassFlops:
        from ..counting.pass_flops import PassFlops

        return PassFlops.of(self._transformer, self._text_length)

    def plan(
        self, request: GenerateRequest, image_size: tuple[int, int] | None = None
    ) -> tuple[PlannedStage, ...]:
        """The stages of a request.

        Args:
            request: for this model.
            image_size: height and width in pixels of the image it enlarges.

        Raises:
            ValueError: the pipeline would refuse it, or its negative prompt acts in no stage.
        """
        stages = self._stages(request, image_size)
        far = request.attention != "full" and settled(request).far
        return tuple(self._planned(stage, request, far) for stage in stages)

    def check_negative(self, request: GenerateRequest, image_size: tuple[int, int] | None) -> None:
        """Refuse a negative prompt where no stage has guidance; arguments are those of `plan`.

        Raises:
            ValueError: see `plan`.
        """
        self._stages(request, image_size)

    def _stages(
        self, request: GenerateRequest, image_size: tuple[int, int] | None
    ) -> tuple[Stage, ...]:
        from ..pipelines.cascade.stages import plan_stages

        pipe = self._pipe
        stages = plan_stages(
            request.height,
            request.width,
            native_size=pipe.native_size,
            token_pixels=pipe.token_pixels,
            text_length=self._text_length,
            **request.stage_options,
            attention="full" if request.attention == "full" else "clear",
            pooled=request.attention == "clear" and request.down_factor > 1,
            image_size=image_size,
            family=pipe.family,
            step=pipe.recipe.step,
        )
        guided = any(stage.guided and stage.strength != 0 for stage in stages)
        if request.negative_prompt is not None and not guided:
            raise UnguidedError(
                f"--negative-prompt acts in guidance's second pass, which enlarging an image by "
                f"--preset {request.preset} has not; take --preset repaint, or leave it out."
            )
        return stages

    def memory(self, request: GenerateRequest, stages: tuple[PlannedStage, ...]) -> list[int]:
        """Bytes of the transformer in each stage of a plan: its weights, and what a step needs.

        As `clear-dit bench plan` counts them, with CLEAR in all stages.
        """
        from ..counting.memory import TransformerMemory

        far = request.attention != "full" and settled(request).far
        kind = request.dtype, request.quantize
        with self._counting:
            if kind not in self._memories:
                dtype = find_dtype(request.dtype)
                self._memories[kind] = TransformerMemory(self._transformer, dtype, request.quantize)
            transformer, found = self._memories[kind], []
            for stage in stages:
                window = self._window(stage, request, far)
                if len(self._activations) >= _MAX_REMEMBERED:
                    self._activations.clear()
                if (*kind, window) not in self._activations:
                    self._activations[*kind, window] = transformer.activations(window)
                found.append(transformer.weights + self._activations[*kind, window])
        return found

    def _planned(self, stage: Stage, request: GenerateRequest, far: bool) -> PlannedStage:
        levels = self._levels(stage, request)
        of_step = passes(self._pipe, request.guidance) if stage.guided else 1
        if stage.attention == "full":
            tokens = stage.height * stage.width // self._pipe.token_pixels**2
            flops = len(levels) * self._flops.full(tokens)
        else:
            window, schedule = self._window(stage, request, far), request.schedule
            flops = sum(
                self._flops.local(window)
                if schedule is None
                else self._flops.scheduled(window, schedule, level)
                for level in levels
            )
        return PlannedStage(
            stage.height,
            stage.width,
            stage.strength,
            len(levels),
            of_step,
            stage.attention,
            of_step * flops,
        )

    def _levels(self, stage: Stage, request: GenerateRequest) -> list[float]:
        """The noise levels of a stage's steps; of the first all 1 where no schedule asks."""
        from ..pipelines.cascade.schedule import sigmas_for, static_scheduler

        if stage.strength == 0:
            return []
        if stage.strength is None and request.schedule is None:
            return [1.0] * request.steps
        scheduler = self._pipe.scheduler
        if stage.resolution.shift is not None:
            scheduler = static_scheduler(scheduler, stage.resolution.shift)
        levels = partial(
            sigmas_for,
            scheduler,
            request.steps,
            stage.height,
            stage.width,
            token_pixels=self._pipe.token_pixels,
            mu=partial(self._pipe.recipe.mu, self._pipe, steps=request.steps),
        )
        return levels() if stage.strength is None else stage.sigmas(levels)[0]

    def _window(self, stage: Any, request: GenerateRequest, far: bool) -> Window:
        return find_window(
            stage.height,
            stage.width,
            request.radius,
            request.down_factor,
            self._text_length,
            self._pipe.token_pixels,
            far=far,
        )


def described(model: Model) -> Any:
    """What stands in for a model's `CLEARPipeline` where only configurations are looked at."""
    index, recipe = model.index, model.family.recipe
    # What `Recipe.options` looks at.
    tokenizers = {
        part: SimpleNamespace(**{"model_max_length": recipe.text_length} | settings)
        for part in index.parts
        if part.startswith("tokenizer")
        for settings in [index.config(part, TOKENIZER_CONFIG)]
    }
    with quiet_libraries():
        from diffusers.configuration_utils import FrozenDict
    config = FrozenDict({"guidance_embeds": False} | index.config("transformer"))
    return SimpleNamespace(
        family=model.family,
        recipe=recipe,
        native_size=model.native_size or recipe.native_size,
        token_pixels=model.token_pixels,
        config=FrozenDict(index.content),
        transformer=SimpleNamespace(config=config),
        **tokenizers,
    )


def _scheduler(model: Model) -> Any:
    """A model's scheduler; modular pipelines make one where their index has none."""
    with quiet_libraries():
        import diffusers

        part = model.index.parts.get("scheduler")
        if part is None:
            return diffusers.FlowMatchEulerDiscreteScheduler()
        kind = getattr(diffusers, str(part.class_name))
    return kind.from_config(model.index.config("scheduler", SCHEDULER_CONFIG))


@dataclass(frozen=True)
class StagePlan:
    """The stages of an image, and the bytes of the transformer in each; printed, it is a table."""

    stages: tuple[PlannedStage, ...]
    memory: tuple[int, ...]

    def __str__(self) -> str:
        rows = [
            {
                "stage": stage.name,
                "from sigma": "1 (noise)" if stage.strength is None else f"{stage.strength:g}",
                "steps": stage.steps,
                "passes": stage.passes,
                "attention": stage.attention,
                "TFLOP": number(stage.flops / 1e12),
                "memory GiB": number(need / 2**30),
            }
            for stage, need in zip(self.stages, self.memory, strict=True)
        ]
        total = number(sum(stage.flops for stage in self.stages) / 1e12)
        return f"{table(rows)}\n{total} TFLOP in all; estimated, of the transformer alone."

    def as_json(self) -> dict[str, Any]:
        """stages, each with memory_bytes, and flops of all."""
        stages = [
            asdict(stage) | {"memory_bytes": need}
            for stage, need in zip(self.stages, self.memory, strict=True)
        ]
        return {"stages": stages, "flops": sum(stage.flops for stage in self.stages)}


def planned(request: GenerateRequest) -> StagePlan:
    """The plan of a request.

    Raises:
        RequestError: it cannot be generated.
    """
    size = None
    if request.image is not None:
        image = read_image(Path(request.image))
        size = (image.height, image.width)
    planner = StagePlanner(request.model)
    with quiet_libraries():
        try:
            stages = planner.plan(request, size)
        except ValueError as error:
            raise RequestError(str(error)) from error
        return StagePlan(stages, tuple(planner.memory(request, stages)))
