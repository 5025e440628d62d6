"""Memory of a forward pass: weights and activations, of a model with fewer blocks.

Counted are the tensors alive between PyTorch's operators, at most, with CLEAR and with the
feed-forward layers in chunks (`chunk_feed_forward`). QK-norm and RoPE are one kernel, which
allocates its output alone, as on a GPU; without Triton they are counted step by step. All blocks of
a kind take the same: the activations are those of a model with two of each.

Not counted: what an operator takes for itself (workspace of products and attention), the
allocator's fragments, PyTorch's own few hundred MiB on a GPU, LoRA, and leaf-level offload, under
whose hooks QK-norm and RoPE are not fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..chunking import CHUNK_TOKENS, chunk_feed_forward
from ..families.recipe import Recipe
from ..families.table import family_of
from ..kernels.window import Window
from .fake import build, defaults, measure, quiet, tensor_bytes
from .inputs import Empty, clear_applied, forward, model_inputs, positions_for
from .narrow import use_narrow_linears

# Meta tensors take the way of a GPU through diffusers and the processor, QK-norm and RoPE in one
# kernel included.
DEVICE = "meta"
MEASURED_BLOCKS = 2
# Blocks on the device under group offload: the one that runs, and the next on its way.
STREAMED_BLOCKS = 2
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


class TransformerMemory:
    """What a transformer takes, from a model of the same configuration with fewer blocks.

    Args:
        quantize: one of `quantize`'s kinds, or None for `dtype`.
        chunk_tokens: see `chunk_feed_forward`.

    Attributes:
        weights, streamed_weights: in bytes, of all blocks and of two of the larger kind.
        recipe: of the family.
    """

    def __init__(
        self,
        config: dict[str, Any],
        dtype: torch.dtype,
        quantize: str | None = None,
        chunk_tokens: int | None = CHUNK_TOKENS,
    ) -> None:
        known = {key for _, key in COUNTS if key in config}
        fewer = {key: min(MEASURED_BLOCKS, config[key]) for key in known}
        with defaults(dtype, DEVICE):
            self._model, whole = build(config | fewer), build(config)
            if quantize is not None:
                for model in (self._model, whole):
                    use_narrow_linears(model, quantize)
        self._dtype = dtype
        family = family_of(whole)
        self.recipe: Recipe = family.recipe
        self._chunked, self._chunk_tokens = family.chunked, chunk_tokens
        blocks = [tensor_bytes(block) for block in _blocks(whole)]
        self.weights: int = tensor_bytes(whole)
        self.streamed_weights: int = self.weights - sum(blocks) + STREAMED_BLOCKS * max(blocks)

    def activations(self, window: Window) -> int:
        """The most that is alive in a step besides the weights, in bytes."""
        inputs = model_inputs(self._model, window, Empty(self._dtype, DEVICE))
        with positions_for(self._model, window, inputs), clear_applied(self._model, window):
            if self._chunked:
                with quiet():
                    chunk_feed_forward(self._model, self._chunk_tokens)
            return measure(self._model, lambda: forward(self._model, inputs)).activations


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What diffusers' group offload takes for blocks: the members of the model's own lists."""
    for stack in dict.fromkeys(stack for stack, _ in COUNTS):
        parts: Any = model
        for name in stack.split("."):
            parts = getattr(parts, name, None)
        yield from parts or ()
