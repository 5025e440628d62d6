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
    length: int = pipe.recipe.options(pipe).get("max_sequence_length", pipe.recipe.text_length)
    return length


def latents_shape(pipe: CLEARPipeline, height: int, width: int) -> tuple[int, ...]:
    """Of the latents of an image of height x width pixels, as the stock pipeline holds them."""
    factor = pipe.latent_pixels
    channels = pipe.transformer.config.in_channels
    return pipe.recipe.latents.shape(channels, height // factor, width // factor)


def denoise(
    pipe: CLEARPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    **stages: Any,
) -> torch.Tensor:
    """Final latents of prompts, from noise of these seeds, one for each.

    Args:
        pipe: whose attention is what it is.
        seeds: an image depends on its own seed only, not on the others in the batch.
        height, width: in pixels.
        steps, guidance: see `GenerateRequest`.
        stages: enlarge, strength, cascade, low_resolution_guidance, stages_dir, resolution, texts
            and callback_on_step_end, see `CLEARPipeline`.

    Returns:
        As the stock pipeline holds them, see `Latents`.
    """
    recipe = pipe.recipe
    images = _guided(pipe, guidance)(
        prompt=prompts,
        height=height,
        width=width,
        num_inference_steps=steps,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="latent",
        **recipe.guidance.options(pipe, guidance, len(prompts)),
        **recipe.options(pipe),
        **stages,
    ).images
    assert isinstance(images, torch.Tensor)
    return images


def _guided(pipe: CLEARPipeline, guidance: float) -> CLEARPipeline:
    """The pipeline; one with a guider of this strength, where guidance is a part of it."""
    guider = getattr(pipe, "guider", None)
    if guider is None or pipe.recipe.guidance.argument is not None:
        return pipe
    call = copy.copy(pipe)
    strength = guidance if passes(pipe, guidance) > 1 else pipe.recipe.guidance.off
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
