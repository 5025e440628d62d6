"""What `CLEARFluxPipeline` is asked, checked before any work."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from .cascade.schedule import check_dynamic_shift
from .cascade.stages import Stage
from .decoding.segments import check_autoencoder
from .parallel.patch_parallel import PatchParallel

WHO = "CLEARFluxPipeline"
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_options(
    pipe: Any, options: dict[str, Any], height: int, width: int, guidance: float | None
) -> None:
    """Refuse what can be told before the stages are planned.

    Args:
        options: the arguments of `FluxPipeline.__call__`.
        height, width: of the image, in pixels.
        guidance: weight of low-resolution guidance.

    Raises:
        ValueError: prompts, sizes, steps, output_type or the weight are out of their range.
    """
    names = tuple(inspect.signature(FluxPipeline.check_inputs).parameters)[5:]
    pipe.check_inputs(
        options["prompt"],
        options["prompt_2"],
        height,
        width,
        **{name: options[name] for name in names},
    )
    if options["output_type"] not in OUTPUT_TYPES:
        raise ValueError(
            f"{WHO}: output_type must be one of {', '.join(OUTPUT_TYPES)}; got "
            f"{options['output_type']!r}."
        )
    if options["num_inference_steps"] < 1:
        raise ValueError(
            f"{WHO}: num_inference_steps must be at least 1, got {options['num_inference_steps']}."
        )
    if guidance is not None and not 0 <= guidance <= 1:
        raise ValueError(f"{WHO}: low_resolution_guidance must be from 0 to 1, got {guidance}.")


def check_stages(
    pipe: Any,
    options: dict[str, Any],
    stages: tuple[Stage, ...],
    pixels: list[torch.Tensor],
    kept: bool,
) -> None:
    """Refuse what does not go with a plan.

    Args:
        options: the arguments of `FluxPipeline.__call__`.
        pixels: the images to start from, if any.
        kept: whether finished stages are kept.

    Raises:
        ValueError: another scheduler or autoencoder, a shift extrapolated too far, latents that do
            not fit, or no generator.
    """
    latents = options["latents"]
    if len(stages) > 1 or pixels or options["output_type"] != "latent":
        check_autoencoder(pipe.vae)
    beyond = len(stages) > 1 or stages[-1].resolution.shift is not None or bool(pixels)
    if beyond and not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"{WHO}: above the native size the scheduler must be a "
            f"FlowMatchEulerDiscreteScheduler, this pipeline has a "
            f"{type(pipe.scheduler).__name__}."
        )
    for stage in stages:
        if stage.resolution.shift is None:
            check_dynamic_shift(
                pipe.scheduler, stage.height, stage.width, 2 * pipe.vae_scale_factor
            )
    if latents is not None:
        if pixels:
            raise ValueError(f"{WHO}: latents are the noise of an image that has no image=.")
        tokens = stages[0].height * stages[0].width // (2 * pipe.vae_scale_factor) ** 2
        if latents.shape[1] != tokens or not latents.isfinite().all():
            raise ValueError(
                f"{WHO}: latents must be finite and packed for the first stage, "
                f"{stages[0].name}: (batch, {tokens}, channels); got {tuple(latents.shape)}."
            )
    if kept and options["generator"] is None:
        raise ValueError(f"{WHO}: stages_dir needs a generator: other noise is another image.")


def check_shared(
    patches: PatchParallel,
    options: dict[str, Any],
    stages: tuple[Stage, ...],
    token_pixels: int,
    stages_dir: Any,
) -> None:
    """Refuse what ranks cannot share.

    Args:
        options: the arguments of `FluxPipeline.__call__`.
        token_pixels: side of a token.

    Raises:
        ValueError: full attention, more ranks than rows of tokens, no generator, or stages_dir.
    """
    if stages[-1].attention == "full":
        raise ValueError(
            f"{WHO}: ranks share an image by way of local attention, and this pipeline has full "
            "attention; call apply_clear first."
        )
    for stage in stages:
        if stage.attention == "clear":
            patches.check(stage.height // token_pixels)
    if options["generator"] is None and options["latents"] is None:
        raise ValueError(
            f"{WHO}: ranks that share an image must draw the same noise; pass generator="
            "torch.Generator().manual_seed(...), the same on every rank."
        )
    if stages_dir is not None:
        raise ValueError(
            f"{WHO}: stages_dir does not work with patch parallelism, where every rank would write "
            "to the folder; leave it out."
        )
