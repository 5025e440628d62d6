"""The parts of a generation: prompts to embeddings, noise to latents, latents to pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .models import text_length

if TYPE_CHECKING:
    from diffusers import FluxPipeline


class Text(NamedTuple):
    """Embeddings of prompts: words (batch, text tokens, channels) and pooled (batch, channels)."""

    words: torch.Tensor
    pooled: torch.Tensor


@torch.no_grad()
def encode(pipe: FluxPipeline, prompts: list[str]) -> Text:
    """Prompts as the transformer takes them, in its dtype, padded to `text_length(pipe)`."""
    embeds, pooled, _ = pipe.encode_prompt(
        prompt=prompts, prompt_2=None, device=pipe.device, max_sequence_length=text_length(pipe)
    )
    dtype = pipe.transformer.dtype  # under autocast the encoders' output has another
    return Text(embeds.to(dtype), pooled.to(dtype))


def two_passes(pipe: FluxPipeline, guidance: float) -> bool:
    """Whether guidance of this strength takes a second pass, with an empty prompt."""
    return not pipe.transformer.config.guidance_embeds and guidance > 1


def denoise(
    pipe: FluxPipeline,
    text: Text,
    empty: Text | None,
    seeds: list[int],
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    **stages: Any,
) -> torch.Tensor:
    """Final latents, from noise of these seeds, one for each prompt.

    Args:
        pipe: whose attention is what it is.
        text: of the prompts, on the pipeline's device.
        empty: of one empty prompt, where guidance takes two passes (see `two_passes`).
        seeds: an image depends on its own seed only, not on the others in the batch.
        height, width: in pixels.
        steps, guidance: see `GenerateRequest`.
        stages: image, strength, cascade, low_resolution_guidance, stages_dir, resolution and
            callback_on_step_end, see `CLEARFluxPipeline`.

    Returns:
        Packed, (batch, tokens, channels), in the pipeline's dtype.
    """
    arguments: dict[str, Any] = {"prompt_embeds": text.words, "pooled_prompt_embeds": text.pooled}
    if empty is not None:
        arguments["negative_prompt_embeds"] = empty.words.expand_as(text.words)
        arguments["negative_pooled_prompt_embeds"] = empty.pooled.expand_as(text.pooled)
    embedded = bool(pipe.transformer.config.guidance_embeds)
    return pipe(
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance if embedded else 1.0,
        true_cfg_scale=1.0 if empty is None else guidance,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        max_sequence_length=text_length(pipe),
        output_type="latent",
        **arguments,
        **stages,
    ).images


def unpack(pipe: FluxPipeline, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Packed latents of an image of height x width pixels: (batch, channels, rows, columns)."""
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)


def decode(pipe: FluxPipeline, latents: torch.Tensor, height: int, width: int) -> Any:
    """Packed latents (1, tokens, channels) to a PIL image of height x width pixels."""
    from ..pipelines.decoding.autoencoder import decode as decode_image

    pixels = decode_image(pipe.vae, unpack(pipe, latents, height, width))
    return pipe.image_processor.postprocess(pixels, output_type="pil")[0]
