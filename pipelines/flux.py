"""FLUX text-to-image with CLEAR."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from clear_dit.plugin import install, transformer_of
from clear_dit.processor import CLEARProcessor
from clear_dit.weights import load_clear_weights


class CLEARFluxPipeline(FluxPipeline):
    """`diffusers.FluxPipeline` with CLEAR's two methods on it.

    Unlike its parent it refuses sizes that are not whole tokens (16 pixels) instead of rounding
    them, and gives the transformer position ids in float32: bfloat16 cannot tell neighbours above
    256 apart, which is a side of 4096 pixels.
    """

    def set_attn_processor(self, processor: Any) -> None:
        """Set the transformer's attention processor.

        Args:
            processor: a `CLEARProcessor`, whose settings are applied to every layer as
                `apply_clear` does; or what diffusers takes: a processor for all layers, or a dict
                with one for each. The latter two leave loaded weights as they are; `remove_clear`
                restores those too.
        """
        if isinstance(processor, CLEARProcessor):
            install(transformer_of(self, "set_attn_processor"), processor)
            return
        if isinstance(processor, dict):
            processor = dict(processor)  # diffusers empties it
        self.transformer.set_attn_processor(processor)

    def load_clear_weights(
        self, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> None:
        """`clear_dit.load_clear_weights` on this pipeline."""
        load_clear_weights(self, pretrained_model_name_or_path, **options)

    def check_inputs(
        self, prompt: Any, prompt_2: Any, height: int, width: int, *args: Any, **kwargs: Any
    ) -> None:
        """As in `FluxPipeline`, but sizes are refused and not rounded.

        Raises:
            ValueError: height or width is not a positive multiple of a token's side.
        """
        side = self.vae_scale_factor * 2
        for name, pixels in (("height", height), ("width", width)):
            if pixels <= 0 or pixels % side:
                lower = max(pixels // side, 1) * side
                raise ValueError(
                    f"CLEARFluxPipeline: {name} must be a multiple of {side} pixels, got {pixels}; "
                    f"the nearest are {lower} and {lower + side}."
                )
        super().check_inputs(prompt, prompt_2, height, width, *args, **kwargs)

    @staticmethod
    def _prepare_latent_image_ids(
        batch_size: int, height: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        return FluxPipeline._prepare_latent_image_ids(
            batch_size, height, width, device, torch.float32
        )
