"""Running a plan: text-to-image, then image-to-image from the enlarged image, stage by stage.

Every stage is one call of the stock pipeline's `__call__`: its own loop, given noised latents and
the end of a schedule where there is an image to start from.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.distributed import ProcessGroup

from clear_dit.families.table import transformer_of
from clear_dit.weights.forward import as_between_forwards
from clear_dit.weights.state import ClearState

from ..decoding.autoencoder import decode, encode
from .enlarge import Enlarger, enlarge
from .low_resolution_guidance import DEFAULT_WEIGHT, GUIDED_ABOVE, LowResolutionGuidance
from .resolution import applied
from .schedule import given_sigmas, place_of, sigmas_for
from .stage_attention import full_attention, keeps_between_forwards, runs_clear
from .stage_files import StageFiles
from .stage_scheduler import Ended, StageScheduler, takes_eulers_steps
from .stages import Stage
from .step_caches import of_a_stage

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Request:
    """What a cascade generates, complete and checked.

    Attributes:
        stages: the plan.
        options: what every stage gives to the stock pipeline's call: text, guidance.
        batch: number of images.
        steps: of a whole schedule; a stage that starts from an image takes its share.
        sigmas: noise levels of the first stage, before the scheduler's shift; None for evenly
            spaced ones.
        generator: of the first stage's noise; those of the other stages follow from its state.
        latents: noise of the first stage, as the stock call takes it; None to draw it.
        pixels: images to start from, (1, 3, height, width) in [-1, 1]: one, or one for each of
            the batch; none to start from noise.
        guidance_weight: of low-resolution guidance in every stage that enlarges; None is
            `DEFAULT_WEIGHT` in stages with a side above `GUIDED_ABOVE` pixels.
        callback: as `callback_on_step_end` in diffusers.
        callback_inputs: the tensors it is given.
        upscaler: of the images that stages start from, see `enlarge`.
    """

    stages: tuple[Stage, ...]
    options: dict[str, Any]
    batch: int
    steps: int
    sigmas: Sequence[float] | None
    generator: Generators
    latents: torch.Tensor | None
    pixels: list[torch.Tensor]
    guidance_weight: float | None
    callback: Callable[..., dict[str, Any]] | None
    callback_inputs: Sequence[str]
    upscaler: Enlarger | None = None

    def weight(self, stage: Stage) -> float:
        """Of low-resolution guidance in a stage that enlarges."""
        if self.guidance_weight is not None:
            return self.guidance_weight
        return DEFAULT_WEIGHT if max(stage.height, stage.width) > GUIDED_ABOVE else 0.0


def run_stages(pipe: Any, request: Request, files: StageFiles | None) -> tuple[torch.Tensor, Stage]:
    """Latents, as the stock pipeline gives them, of the last stage that was run, and that stage.

    It is not the last of the plan only if `pipe.interrupt` was set; then its image may be
    unfinished, or only enlarged.

    Raises:
        FloatingPointError: latents are NaN or infinite after a step.
    """
    generators = [_fork(request.generator, number) for number in range(len(request.stages))]
    if request.stages[0].strength is not None:
        _advance(request.generator)
    finished = files.last_finished() if files is not None else None
    first = 0 if finished is None else finished[0] + 1
    latents = None if finished is None else finished[1].to(pipe._execution_device)
    stage = request.stages[max(first - 1, 0)]
    for index in range(first, len(request.stages)):
        previous, stage = stage, request.stages[index]
        with _settings(pipe, request.stages, index):
            if stage.strength is None:
                latents = _generate(pipe, request, stage)
            else:
                images: Iterable[torch.Tensor] = request.pixels
                if latents is not None:
                    images = images_from(pipe, latents, previous)
                latents = _repaint(pipe, request, stage, images, generators[index])
        if pipe.interrupt:
            break
        if files is not None:
            files.save(index, latents)
    assert latents is not None
    return latents, stage


@contextmanager
def _settings(pipe: Any, stages: tuple[Stage, ...], index: int) -> Iterator[None]:
    """The pipeline, a call's own, as a stage needs it."""
    # diffusers sets it when somebody first asks for a bar.
    stage, bar = stages[index], getattr(pipe, "_progress_bar_config", {})
    model = transformer_of(pipe, "CLEARPipeline")
    with ExitStack() as stack:
        if keeps_between_forwards(model):
            stack.enter_context(ClearState.attach(model).access.exclusive())
        if stage.attention == "full" and runs_clear(model):
            stack.enter_context(full_attention(model))
        # After it: positions may need processors of their own.
        stack.enter_context(applied(pipe, stage.resolution))
        if not stage.guided:
            stack.enter_context(_unguided(pipe))
        if len(stages) > 1:
            description = f"stage {index + 1} of {len(stages)}, {stage.name}"
            pipe._progress_bar_config = bar | {"desc": description}
        pipe._stage = stage
        try:
            yield
        finally:
            pipe._progress_bar_config, pipe._stage = bar, None


@contextmanager
def _unguided(pipe: Any) -> Iterator[None]:
    """Within it a pipeline's guider, and ranks that share guidance's passes, take one pass."""
    guider = getattr(pipe, "guider", None)
    with ExitStack() as stack:
        if pipe.patch_parallel is not None:
            stack.enter_context(pipe.patch_parallel.unguided())
        if guider is not None:
            pipe.guider = guider.new(guidance_scale=pipe.recipe.guidance.off)
            stack.callback(setattr, pipe, "guider", guider)
        yield


def images_from(pipe: Any, latents: torch.Tensor, stage: Stage) -> Iterator[torch.Tensor]:
    """Decoded one by one, (1, 3, height, width) in [-1, 1]."""
    latents = _unpack(pipe, latents, stage)
    return (decode(pipe.vae, one, group=_tile_group(pipe)) for one in latents.split(1))


def _generate(pipe: Any, request: Request, stage: Stage) -> torch.Tensor:
    """Text-to-image."""
    return _denoise(
        pipe,
        request,
        stage,
        None,
        begins=0.0,
        num_inference_steps=request.steps,
        sigmas=request.sigmas,
        latents=request.latents,
        generator=request.generator,
    )


def _repaint(
    pipe: Any,
    request: Request,
    stage: Stage,
    images: Iterable[torch.Tensor],
    generator: Generators,
) -> torch.Tensor:
    """Image-to-image from images (1, 3, height, width) of any smaller size."""
    encoded, enlargement = [], 1.0
    for pixels in images:
        enlargement = max(stage.height / pixels.shape[-2], stage.width / pixels.shape[-1])
        encoded.append(_encoded(pipe, pixels, stage, request.upscaler))
    reference = torch.cat(encoded).float()
    reference = reference.expand(request.batch, *reference.shape[1:])
    # Where it knows the text only later, the stock pipeline casts to what it takes.
    text = request.options.get("prompt_embeds")
    dtype = text.dtype if isinstance(text, torch.Tensor) else torch.float32
    if not pipe.recipe.casts_latents:
        dtype = pipe.transformer.dtype
    if not stage.strength or pipe.interrupt:
        return _pack(pipe, reference).to(dtype)
    levels = partial(
        sigmas_for,
        pipe.scheduler,
        request.steps,
        stage.height,
        stage.width,
        token_pixels=pipe.token_pixels,
        mu=partial(pipe.recipe.mu, pipe, steps=request.steps),
    )
    sigmas, fewer = stage.sigmas(levels)
    noise = randn_tensor(reference.shape, generator, reference.device, dtype)
    start = sigmas[0] * noise + (1 - sigmas[0]) * reference
    weight = request.weight(stage)
    guidance = LowResolutionGuidance(reference, start, enlargement, weight) if weight else None
    with given_sigmas(pipe):
        return _denoise(
            pipe,
            request,
            stage,
            guidance,
            begins=place_of(sigmas[0], levels()),
            second_order=fewer,
            num_inference_steps=len(sigmas),
            sigmas=sigmas,
            latents=pipe.recipe.latents.as_given(start).to(dtype),
        )


def _encoded(
    pipe: Any, pixels: torch.Tensor, stage: Stage, upscaler: Enlarger | None
) -> torch.Tensor:
    """Latents of an image at a stage's size; the enlarged image is not kept for its denoising."""
    pixels = pixels.to(pipe._execution_device)
    enlarged = enlarge(pixels, stage.height, stage.width, upscaler)
    return encode(pipe.vae, enlarged, group=_tile_group(pipe))


def _denoise(
    pipe: Any,
    request: Request,
    stage: Stage,
    guidance: LowResolutionGuidance | None,
    *,
    begins: float,
    second_order: bool = False,
    **arguments: Any,
) -> torch.Tensor:
    """The stock pipeline's own loop, from `begins` of a whole schedule on."""

    def on_step_end(
        pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        if not tensors["latents"].isfinite().all():
            steps = len(pipe.scheduler.timesteps)
            raise FloatingPointError(
                f"CLEARPipeline: latents are NaN or infinite after step {step + 1} of {steps} "
                f"of stage {request.stages.index(stage) + 1} ({stage.name}); "
                "use float32 or bfloat16, or less guidance."
            )
        if guidance is not None:
            sigmas = pipe.scheduler.sigmas[step : step + 2].tolist()
            steered = guidance.steer(_unpack(pipe, tensors["latents"], stage), *sigmas)
            tensors["latents"] = _pack(pipe, steered)
        if request.callback is not None:
            given = {name: tensors[name] for name in request.callback_inputs}
            with as_between_forwards():
                tensors |= request.callback(pipe, step, timestep, given)
        if pipe.interrupt and not hasattr(pipe.stock, "interrupt"):
            raise Ended(tensors["latents"])
        return tensors

    given = request.options
    if not stage.guided:
        given = pipe.recipe.guidance.without(pipe.transformer.config, given)
    # Z-Image writes its chat template into the list it is given.
    options = {name: list(x) if type(x) is list else x for name, x in given.items()}
    known = inspect.signature(pipe.stock.__call__).parameters
    own, after_step, levels = pipe.scheduler, None, None
    if "callback_on_step_end" in known:
        options["callback_on_step_end"] = on_step_end
        inputs = list({"latents", *request.callback_inputs})
        options["callback_on_step_end_tensor_inputs"] = inputs
    else:
        after_step = partial(_told_by_scheduler, pipe, on_step_end)
    if "sigmas" not in known:
        levels = arguments.pop("sigmas")
    second_order = second_order and takes_eulers_steps(own)
    if levels is not None or after_step is not None or second_order:
        pipe.scheduler = StageScheduler.of(own, levels, after_step, second_order)
    steps = arguments["num_inference_steps"]
    try:
        with of_a_stage(pipe, begins, steps):
            return pipe.stock.__call__(
                pipe,
                height=stage.height,
                width=stage.width,
                output_type="latent",
                return_dict=False,
                **options,
                **arguments,
            )[0]
    except Ended as ended:
        return ended.latents
    finally:
        pipe.scheduler = own


def _told_by_scheduler(
    pipe: Any, on_step_end: Callable[..., Any], step: int, timestep: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    latents: torch.Tensor = on_step_end(pipe, step, timestep, {"latents": x})["latents"]
    return latents


def _tile_group(pipe: Any) -> ProcessGroup | None:
    """The ranks that share out the autoencoder's tiles."""
    return None if pipe.patch_parallel is None else pipe.patch_parallel.group


def _unpack(pipe: Any, latents: torch.Tensor, stage: Stage) -> torch.Tensor:
    """What the stock pipeline holds to (batch, channels, height, width), in latent pixels."""
    height, width = (side // pipe.latent_pixels for side in (stage.height, stage.width))
    # As it lies in memory go the last bits of what is decoded: alike for latents from a file.
    return pipe.recipe.latents.to_grid(latents, height, width).contiguous()


def _pack(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `_unpack`."""
    return pipe.recipe.latents.from_grid(latents)


def _fork(generator: Generators, stage: int) -> Generators:
    """A generator for a stage's noise that depends on the state of the given one alone.

    So a stage generates the same whether the stages before it were generated or read from files.
    """
    if isinstance(generator, list):
        return [_forked(one, stage) for one in generator]
    return None if generator is None else _forked(generator, stage)


def _advance(generator: Generators) -> None:
    """So that the next call with this generator generates another image, as text-to-image does."""
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None:
            torch.rand(1, generator=one, device=one.device)


def _forked(generator: torch.Generator, stage: int) -> torch.Generator:
    state = hashlib.sha256(generator.get_state().numpy().tobytes() + bytes([stage])).digest()
    return torch.Generator(generator.device).manual_seed(int.from_bytes(state[:8]) >> 1)
