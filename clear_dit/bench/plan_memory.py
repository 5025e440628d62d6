"""Peak memory of every stage of an image: text encoding, the cascade's denoising, decoding.

What is counted is said in `counting/memory.py`. Not counted besides: images and latents that wait
outside the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..counting.eight_bit import DTYPES
from ..counting.fake import Memory, build, defaults, measure
from ..counting.memory import TransformerMemory
from ..errors import RequestError
from ..generation.models import TOKEN_PIXELS, quiet_libraries
from ..kernels.window import Window
from .published import Configuration

OFFLOADS = ("none", "model", "group")
# The autoencoder sees a tile of the image and what lies around it, in pixels.
TILE_PIXELS, HALO_PIXELS = 1024, 64
# There, fake tensors take PyTorch's fused attention; on "meta" it would be dense.
DEVICE = "cpu"


def check_memory_options(weights_dtype: str | None, offload: str) -> None:
    """Refuse what `plan_memory` does not know.

    Raises:
        RequestError: an unknown `weights_dtype` or `offload`.
    """
    if weights_dtype not in (None, *DTYPES):
        raise RequestError(
            f"--weights-dtype must be one of {', '.join(DTYPES)}; got {weights_dtype!r}."
        )
    if offload not in OFFLOADS:
        raise RequestError(f"--offload must be one of {', '.join(OFFLOADS)}; got {offload!r}.")


def plan_memory(
    configuration: Configuration,
    window: Window,
    dtype: torch.dtype,
    weights_dtype: str | None = None,
    offload: str = "none",
) -> list[dict[str, Any]]:
    """Peak memory by stage, on the device that runs them.

    Args:
        window: of the image asked for; all but its size holds in all stages.
        dtype: of weights and activations.
        weights_dtype: of the transformer's linear layers: "int8", "float8", or None for `dtype`.
        offload: which weights are on the device: those of all parts ("none"), of the one that
            runs ("model"), and of it only two blocks of the transformer ("group").

    Returns:
        rows with stage, weights_gib, activations_gib and total_gib.
    """
    encoders = [
        _measure_encoder(config, window.text_length, dtype)
        for config in configuration.text_encoders
    ]
    transformer = TransformerMemory(configuration.transformer, dtype, weights_dtype)
    decoding, (tile_height, tile_width) = _measure_decoder(configuration, window, dtype)

    everything = sum(part.weights for part in encoders) + transformer.weights + decoding.weights
    denoising = transformer.streamed_weights if offload == "group" else transformer.weights
    text = max(encoders, key=lambda part: sum(part) if offload != "none" else part.activations)
    stages = [("text encoding", text)]
    side, recipe = configuration.token_pixels, transformer.recipe
    native_size = configuration.native_size or recipe.native_size
    for height, width in cascade_sizes(window, native_size, side, recipe.step):
        size = f"denoising {height * side} x {width * side}"
        down_factor = min(window.down_factor, height, width)
        smaller = replace(window, height=height, width=width, down_factor=down_factor)
        stages.append((size, Memory(denoising, transformer.activations(smaller))))
    stages.append((f"decoding a tile of {tile_height} x {tile_width}", decoding))
    rows = []
    for stage, memory in stages:
        weights = everything if offload == "none" else memory.weights
        rows.append(
            {
                "stage": stage,
                "weights_gib": weights / 2**30,
                "activations_gib": memory.activations / 2**30,
                "total_gib": (weights + memory.activations) / 2**30,
            }
        )
    return rows


def cascade_sizes(
    window: Window, native_size: int, side: int = TOKEN_PIXELS, step: int = 1
) -> list[tuple[int, int]]:
    """(rows, columns), in tokens, of the images on the way to a window's, from small to large.

    Args:
        native_size: side of a square of as many pixels as the model was trained at, in pixels.
        side: of a token, in pixels.
        step: of images' sides, in tokens.
    """
    with quiet_libraries():
        from ..pipelines.cascade.resolution import Resolution
        from ..pipelines.cascade.stages import plan_stages

    stages = plan_stages(
        window.height * side,
        window.width * side,
        native_size=native_size,
        token_pixels=side,
        step=step,
        resolution=lambda height, width: Resolution(),  # of which nothing is wanted here
    )
    return [(stage.height // side, stage.width // side) for stage in stages]


def _measure_encoder(config: dict[str, Any], text_length: int, dtype: torch.dtype) -> Memory:
    with FakeTensorMode():
        with defaults(dtype, DEVICE):
            model = build(config)
        length = min(text_length, getattr(model.config, "max_position_embeddings", text_length))
        tokens = torch.zeros(1, length, dtype=torch.int64, device=DEVICE)
        return measure(model, lambda: model(tokens))


def _measure_decoder(
    configuration: Configuration, window: Window, dtype: torch.dtype
) -> tuple[Memory, tuple[int, int]]:
    """Memory of the stock autoencoder on one tile, whose height and width in pixels come along."""
    with FakeTensorMode():
        with defaults(dtype, DEVICE):
            model = build(configuration.autoencoder)
        height, width = (
            min(size * configuration.token_pixels, TILE_PIXELS + 2 * HALO_PIXELS)
            for size in (window.height, window.width)
        )
        # Autoencoders of Qwen-Image and those after it are of videos.
        video = hasattr(model.config, "z_dim")
        channels = model.config.z_dim if video else model.config.latent_channels
        sides = (size // configuration.latent_pixels for size in (height, width))
        shape = (1, channels, *((1,) if video else ()), *sides)
        latents = torch.empty(shape, dtype=dtype, device=DEVICE)
        return measure(model, lambda: model.decode(latents)), (height, width)
