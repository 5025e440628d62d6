"""Peak memory of every stage of an image: text encoding, the cascade's denoising, decoding.

Counted are the tensors alive between PyTorch's operators, at most, with CLEAR and with the
feed-forward layers in chunks (`chunk_feed_forward`). QK-norm and RoPE are one kernel, which
allocates its output alone, as on a GPU; without Triton they are counted step by step. All blocks of
a kind take the same: the activations are those of a model with two of each.

Not counted: what an operator takes for itself (workspace of products, convolutions and attention),
the allocator's fragments, PyTorch's own few hundred MiB on a GPU, images and latents that wait
outside the model, LoRA, and leaf-level offload, under whose hooks QK-norm and RoPE are not fused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..chunking import CHUNK_TOKENS, chunk_feed_forward
from ..errors import RequestError
from ..families.table import family_of
from ..generation.models import TOKEN_PIXELS, quiet_libraries
from ..kernels.window import Window
from .eight_bit import DTYPES, use_eight_bit_linears
from .fake import Memory, build, defaults, measure, quiet, tensor_bytes
from .inputs import Empty, clear_applied, forward, model_inputs, positions_for
from .published import Configuration

OFFLOADS = ("none", "model", "group")
# Meta tensors take the way of a GPU through diffusers and the processor, QK-norm and RoPE in one
# kernel included. On "cpu", fake ones take PyTorch's fused attention; on "meta" it would be dense.
TRANSFORMER_DEVICE, OTHERS_DEVICE = "meta", "cpu"
MEASURED_BLOCKS = 2
# Blocks on the device under group offload: the one that runs, and the next on its way.
STREAMED_BLOCKS = 2
# The autoencoder sees a tile of the image and what lies around it, in pixels.
TILE_PIXELS, HALO_PIXELS = 1024, 64
# Stacks of blocks, and what a configuration calls their number.
COUNTS = (
    ("transformer_blocks", "num_layers"),
    ("single_transformer_blocks", "num_single_layers"),
    ("layers", "n_layers"),
    ("layers", "num_layers"),
    ("mode_blocks.image", "num_layers"),
    ("mode_blocks.image_cond", "num_layers"),
    ("txt_mode_blocks", "num_layers"),
)


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


class TransformerMemory:
    """What a transformer takes, from a model of the same configuration with fewer blocks.

    Args:
        chunk_tokens: see `chunk_feed_forward`.

    Attributes:
        weights, streamed_weights: in bytes, of all blocks and of two of the larger kind.
        recipe: of the family.
    """

    def __init__(
        self,
        config: dict[str, Any],
        dtype: torch.dtype,
        weights_dtype: str | None,
        chunk_tokens: int | None = CHUNK_TOKENS,
    ) -> None:
        known = {key for _, key in COUNTS if key in config}
        fewer = {key: min(MEASURED_BLOCKS, config[key]) for key in known}
        with defaults(dtype, TRANSFORMER_DEVICE):
            self._model = build(config | fewer)
            if weights_dtype is not None:
                use_eight_bit_linears(self._model, weights_dtype)
        self._dtype = dtype
        family = family_of(self._model)
        self.recipe = family.recipe
        self._chunked, self._chunk_tokens = family.chunked, chunk_tokens
        parts: Any = dict(self._model.named_modules())
        counts = {stack: config[key] for stack, key in COUNTS if key in known and stack in parts}
        stacks = {stack: list(parts[stack]) for stack in counts}
        first = {
            stack: tensor_bytes(blocks[0]) if blocks else 0 for stack, blocks in stacks.items()
        }
        present = sum(tensor_bytes(block) for blocks in stacks.values() for block in blocks)
        whole = tensor_bytes(self._model)
        # Blocks left out are like the first of their kind.
        self.weights = whole + sum(
            first[stack] * (count - len(stacks[stack])) for stack, count in counts.items()
        )
        self.streamed_weights = whole - present + STREAMED_BLOCKS * max(first.values())

    def activations(self, window: Window) -> int:
        """The most that is alive in a step besides the weights, in bytes."""
        inputs = model_inputs(self._model, window, Empty(self._dtype, TRANSFORMER_DEVICE))
        with positions_for(self._model, window, inputs), clear_applied(self._model, window):
            if self._chunked:
                with quiet():
                    chunk_feed_forward(self._model, self._chunk_tokens)
            return measure(self._model, lambda: forward(self._model, inputs)).activations


def _measure_encoder(config: dict[str, Any], text_length: int, dtype: torch.dtype) -> Memory:
    with FakeTensorMode():
        with defaults(dtype, OTHERS_DEVICE):
            model = build(config)
        length = min(text_length, getattr(model.config, "max_position_embeddings", text_length))
        tokens = torch.zeros(1, length, dtype=torch.int64, device=OTHERS_DEVICE)
        return measure(model, lambda: model(tokens))


def _measure_decoder(
    configuration: Configuration, window: Window, dtype: torch.dtype
) -> tuple[Memory, tuple[int, int]]:
    """Memory of the stock autoencoder on one tile, whose height and width in pixels come along."""
    with FakeTensorMode():
        with defaults(dtype, OTHERS_DEVICE):
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
        latents = torch.empty(shape, dtype=dtype, device=OTHERS_DEVICE)
        return measure(model, lambda: model.decode(latents)), (height, width)
