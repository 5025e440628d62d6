"""Peak memory of every stage of an image: text encoding, the cascade's denoising, decoding.

What is counted is said in `counting/memory.py`. Not counted besides: images and latents that wait
outside the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..counting.fake import Memory, build, defaults, measure
from ..counting.memory import TransformerMemory
from ..errors import RequestError
from ..generation.models import TOKEN_PIXELS, quiet_libraries
from ..generation.placing import check_offload
from ..kernels.window import Window
from ..weights.quantise import KINDS
from .published import Configuration

# The autoencoder sees a tile of the image and what lies around it, in pixels.
TILE_PIXELS, HALO_PIXELS = 1024, 64
# Of a text encoder under group offload: the layer that runs, and the next on its way.
STREAMED_LAYERS = 2
# There, fake tensors take PyTorch's fused attention; on "meta" it would be dense.
DEVICE = "cpu"


def check_memory_options(quantize: str | None, offload: str) -> None:
    """Refuse what `plan_memory` does not know.

    Raises:
        RequestError: an unknown `quantize` or `offload`.
    """
    if quantize not in (None, *KINDS):
        raise RequestError(f"--quantize must be one of {', '.join(KINDS)}; got {quantize!r}.")
    check_offload(offload)


def plan_memory(
    configuration: Configuration,
    window: Window,
    dtype: torch.dtype,
    quantize: str | None = None,
    offload: str = "none",
) -> list[dict[str, Any]]:
    """Peak memory by stage, on the device that runs them.

    Args:
        window: of the image asked for; all but its size holds in all stages.
        dtype: of weights and activations.
        quantize: the transformer's linear layers, see `quantize`; None for `dtype`.
        offload: which weights are on the device: those of all parts ("none"), of the one that
            runs ("model"), or of the autoencoder, two blocks of the transformer, or two layers of
            a text encoder ("group").

    Returns:
        rows with stage, weights_gib, activations_gib and total_gib.
    """
    others = OtherParts(configuration, window, dtype)
    transformer = TransformerMemory(configuration.transformer, dtype, quantize)
    side, recipe = configuration.token_pixels, transformer.recipe
    native_size = configuration.native_size or recipe.native_size
    denoising = list[tuple[str, float]]()
    for height, width in cascade_sizes(window, native_size, side, recipe.step):
        down_factor = min(window.down_factor, height, width)
        smaller = replace(window, height=height, width=width, down_factor=down_factor)
        size = f"denoising {height * side} x {width * side}"
        denoising.append((size, transformer.activations(smaller)))
    return stage_rows(others, transformer, denoising, offload)


class OtherParts:
    """What a pipeline's text encoders and autoencoder take.

    Args:
        window: of an image, which the autoencoder decodes by tiles.

    Attributes:
        encoders: of each the memory, and what is of its weights on the device when it is offloaded
            layer by layer.
        decoding: of a tile and its surroundings, `tile`: height and width in pixels.
    """

    def __init__(self, configuration: Configuration, window: Window, dtype: torch.dtype) -> None:
        self.encoders: list[tuple[Memory, int]] = [
            _measure_encoder(config, window.text_length, dtype)
            for config in configuration.text_encoders
        ]
        decoding, tile = _measure_decoder(configuration, window, dtype)
        self.decoding: Memory = decoding
        self.tile: tuple[int, int] = tile


def stage_rows(
    others: OtherParts,
    transformer: TransformerMemory,
    denoising: list[tuple[str, float]],
    offload: str,
) -> list[dict[str, Any]]:
    """The rows of `plan_memory`.

    Args:
        denoising: names of stages, and the activations of each in bytes.
    """
    encoders, decoding = [part for part, _ in others.encoders], others.decoding
    everything = sum(part.weights for part in encoders) + transformer.weights + decoding.weights
    of_text = of_denoising = of_decoding = everything
    text = max(part.activations for part in encoders)
    if offload == "model":
        of_text, text = max(encoders, key=sum)
        of_denoising, of_decoding = transformer.weights, decoding.weights
    elif offload == "group":  # the autoencoder stays on the device
        streamed = [(layers, part.activations) for part, layers in others.encoders]
        of_text, text = max(streamed, key=sum)
        of_text += decoding.weights
        of_denoising = transformer.streamed_weights + decoding.weights
        of_decoding = decoding.weights
    height, width = others.tile
    stages = [
        ("text encoding", of_text, text),
        *((stage, of_denoising, activations) for stage, activations in denoising),
        (f"decoding a tile of {height} x {width}", of_decoding, decoding.activations),
    ]
    return [
        {
            "stage": stage,
            "weights_gib": weights / 2**30,
            "activations_gib": activations / 2**30,
            "total_gib": (weights + activations) / 2**30,
        }
        for stage, weights, activations in stages
    ]


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


def _measure_encoder(
    config: dict[str, Any], text_length: int, dtype: torch.dtype
) -> tuple[Memory, int]:
    """Memory of an encoder, and of its two largest layers' weights."""
    with FakeTensorMode():
        with defaults(dtype, DEVICE):
            model = build(config)
        length = min(text_length, getattr(model.config, "max_position_embeddings", text_length))
        tokens = torch.zeros(1, length, dtype=torch.int64, device=DEVICE)
        layers = [
            sum(parameter.nbytes for parameter in module.parameters(recurse=False))
            for module in model.modules()
        ]
        return measure(model, lambda: model(tokens)), STREAMED_LAYERS * max(layers)


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
