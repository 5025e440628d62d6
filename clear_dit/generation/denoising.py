"""The parts of a generation: prompts and noise to latents, latents to pixels."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..pipelines.pipeline import CLEARPipeline


def passes(pipe: CLEARPipeline, guidance: float) -> int:
    """Forwards of the transformer in a step, with guidance of this strength."""
    return pipe.recipe.guidance.passes(pipe.transformer.config, guidance)


def text_length(pipe: CLEARPipeline) -> int:
    """Tokens of text that `denoise` gives the transformer, padding included, at most."""
    length: int = pipe.recipe.given_length(pipe)
    return length


def latents_shape(pipe: CLEARPipeline, height: int, width: int) -> tuple[int, ...]:
    """Of the latents of an image of height x width pixels, as the stock pipeline holds them."""
    factor = pipe.latent_pixels
    channels = pipe.transformer.config.in_channels
    return pipe.recipe.latents.shape(channels, height // factor, width // factor)


def in_calls(pipe: CLEARPipeline, prompts: list[str]) -> list[list[str]]:
    """Prompts as the pipeline takes them: all in one call, or each in a call of its own."""
    return [prompts] if pipe.recipe.several_prompts else [[prompt] for prompt in prompts]


def denoise(
    pipe: CLEARPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    negative_prompt: str | None = None,
    **stages: Any,
) -> torch.Tensor:
    """Final latents of prompts, from noise of these seeds, one for each.

    Args:
        pipe: whose attention is what it is.
        seeds: an image depends on its own seed only, not on the others in the batch.
        height, width: in pixels.
        steps, guidance, negative_prompt: see `GenerateRequest`.
        stages: enlarge, preset, strength, stage_steps, cascade, low_resolution_guidance, upscaler,
            stages_dir, resolution, texts and callback_on_step_end, see `CLEARPipeline`.

    Returns:
        As the stock pipeline holds them, see `Latents`.
    """
    recipe, call, left = pipe.recipe, _guided(pipe, guidance), iter(seeds)
    images = [
        call(
            prompt=some,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(next(left)) for _ in some],
            output_type="latent",
            **recipe.guidance.options(pipe, guidance, len(some), negative_prompt),
            **recipe.options(pipe),
            **stages,
        ).images
        for some in in_calls(pipe, prompts)
    ]
    return torch.cat(images)


def _guided(pipe: CLEARPipeline, guidance: float) -> CLEARPipeline:
    """The pipeline; one with a guider of this strength, where guidance is a part of it.

    Raises:
        ValueError: guidance of a pipeline without a guider, such as one of few steps.
    """
    if pipe.recipe.guidance.argument is not None:
        return pipe
    guider, off = getattr(pipe, "guider", None), pipe.recipe.guidance.off
    strength = guidance if passes(pipe, guidance) > 1 else off
    if guider is None:
        if strength > off:
            raise ValueError(
                f"{pipe.family.title}: this pipeline has no guider, and takes no guidance of "
                f"{guidance:g}; use {off:g}."
            )
        return pipe
    call = copy.copy(pipe)
    call.guider = guider.new(guidance_scale=strength)
    return call


def unpack(pipe: CLEARPipeline, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Latents of an image of height x width pixels: (batch, channels, rows, columns)."""
    factor = pipe.latent_pixels
    return pipe.recipe.latents.to_grid(latents, height // factor, width // factor)


def decode(pipe: CLEARPipeline, latents: torch.Tensor, height: int, width: int) -> Any:
    """Latents of one image, batch 1, to a PIL image of height x width pixels."""
    from ..pipelines.decoding.autoencoder import decode as decode_image

    pixels = decode_image(pipe.vae, unpack(pipe, latents, height, width))
    return pipe.image_processor.postprocess(pixels, output_type="pil")[0]
