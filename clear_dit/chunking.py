"""FLUX's blocks with a shorter life of their large tensors: feed-forward layers chunk by chunk.

A token's feed-forward layer needs no other token. Run over chunks of the sequence it holds a
chunk's hidden channels, four and five times the model's width, instead of the sequence's. At
8192 px a tensor of the sequence is 1.5 GiB in FLUX.1-dev; a stock single block has up to 13 of them
alive, these have 6: the input, its norm, query, key, value and the attention's output.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .compat import names_from
from .hooks import Innermost, loaded_once
from .kernels.numbers import integer

FluxSingleTransformerBlock: Any
FluxTransformerBlock: Any
FluxSingleTransformerBlock, FluxTransformerBlock = names_from(
    "diffusers.models.transformers.transformer_flux",
    "FluxSingleTransformerBlock",
    "FluxTransformerBlock",
)

logger: logging.Logger = logging.getLogger(__name__)

# Products of this many rows fill any GPU, and a chunk takes 1.2 GiB in FLUX.1-dev. Sequences are
# longer from 2048 x 2048 px on.
CHUNK_TOKENS = 16384

Run = Callable[[slice], torch.Tensor]


def chunk_feed_forward(pipe_or_model: Any, tokens: int | None = CHUNK_TOKENS) -> None:
    """Run the feed-forward layers of FLUX's blocks over chunks of the sequence.

    Exact: every token is computed from the same numbers by the same modules, in products of fewer
    rows. Each forward decides for itself: sequences no longer than a chunk, forwards with gradients
    (autograd keeps every chunk anyway) and those torch.compile traces run as before. Weights that
    are offloaded by layer are brought once for all chunks of a block. A second call replaces the
    size.

    Args:
        pipe_or_model: a pipeline with a transformer, or a model with FLUX's blocks, as ControlNets
            have them too.
        tokens: text and image tokens in a chunk, at most; chunks are of equal size or one token
            apart. None puts the stock forward back.

    Raises:
        ValueError: `tokens` is not a positive integer, or no block is FLUX's.
        ImportError: the blocks of the installed diffusers compute something else.
    """
    if tokens is not None:
        tokens = integer("chunk_feed_forward: tokens", tokens, 1)
    model = getattr(pipe_or_model, "transformer", pipe_or_model)
    blocks = [module for module in model.modules() if _chunked(module) is not None]
    if not blocks:
        raise ValueError(
            f"chunk_feed_forward: needs a model with {' or '.join(c.__name__ for c in FORWARDS)}; "
            f"got {type(model).__name__}."
        )
    _check_forwards()
    for block in blocks:
        place = Innermost(block)
        if isinstance(place.forward, ChunkedForward):
            place.forward = place.forward.stock
        if tokens is not None:
            place.forward = ChunkedForward(block, place.forward, tokens)
    what = "whole" if tokens is None else f"in chunks of up to {tokens} tokens"
    logger.debug("the feed-forward layers of %d blocks run %s", len(blocks), what)


def is_chunked(model: nn.Module) -> bool:
    """Whether `chunk_feed_forward` was called on a model, with any size."""
    blocks = (module for module in model.modules() if _chunked(module) is not None)
    return any(isinstance(Innermost(block).forward, ChunkedForward) for block in blocks)


class ChunkedForward:
    """A block's forward: in chunks where that saves memory, else the one it stands for."""

    def __init__(self, block: nn.Module, stock: Callable[..., Any], tokens: int) -> None:
        self.block = block
        self.chunked: Any = _chunked(block)
        self.stock = stock
        self.tokens = tokens

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = encoder_hidden_states.shape[1] + hidden_states.shape[1]
        # Compiled, chunks would be unrolled, and every resolution compiled anew.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or length <= self.tokens:
            return self.stock(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        attention = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
        return self.chunked(
            self.block, encoder_hidden_states, hidden_states, temb, attention, self.tokens
        )


def _double_forward(
    block: Any,
    text: torch.Tensor,
    image: torch.Tensor,
    temb: torch.Tensor,
    attention: dict[str, Any],
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`FluxTransformerBlock.forward`: (text, image), (batch, tokens, channels) each."""
    normed, *modulation = block.norm1(image, emb=temb)
    normed_text, *text_modulation = block.norm1_context(text, emb=temb)
    out, text_out, *adapter_out = block.attn(
        hidden_states=normed, encoder_hidden_states=normed_text, **attention
    )
    del normed

    def finish(part: slice) -> torch.Tensor:
        done = _finish_stream(image[:, part], out[:, part], modulation, block.norm2, block.ff)
        return done + adapter_out[0][:, part] if adapter_out else done

    def finish_text(part: slice) -> torch.Tensor:
        streams = text[:, part], text_out[:, part]
        return _finish_stream(*streams, text_modulation, block.norm2_context, block.ff_context)

    text_done = by_chunks(finish_text, text.shape[1], tokens, block.ff_context)
    return _finite(text_done), by_chunks(finish, image.shape[1], tokens, block.ff)


def _finish_stream(
    hidden: torch.Tensor,
    attention_out: torch.Tensor,
    modulation: list[torch.Tensor],
    norm: nn.Module,
    feed_forward: nn.Module,
) -> torch.Tensor:
    gate, shift, scale, feed_forward_gate = (x[:, None] for x in modulation)
    hidden = hidden + gate * attention_out
    return hidden + feed_forward_gate * feed_forward(norm(hidden) * (1 + scale) + shift)


def _single_forward(
    block: Any,
    text: torch.Tensor,
    image: torch.Tensor,
    temb: torch.Tensor,
    attention: dict[str, Any],
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`FluxSingleTransformerBlock.forward`: (text, image), (batch, tokens, channels) each."""
    # Text and image are joined here, and again chunk by chunk: not kept through the attention.
    normed, gate = block.norm(torch.cat([text, image], dim=1), emb=temb)
    out = block.attn(hidden_states=normed, **attention)
    length = text.shape[1]

    def finish(part: slice) -> torch.Tensor:
        before, after = min(part.start, length), min(part.stop, length)
        residual = torch.cat(
            [text[:, before:after], image[:, part.start - before : part.stop - after]], dim=1
        )
        hidden = block.act_mlp(block.proj_mlp(normed[:, part]))
        hidden = block.proj_out(torch.cat([out[:, part], hidden], dim=2))
        return residual + gate.unsqueeze(1) * hidden

    joint = by_chunks(finish, normed.shape[1], tokens, block.proj_mlp, block.proj_out)
    joint = _finite(joint)
    return joint[:, :length], joint[:, length:]


FORWARDS: dict[type[nn.Module], Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    FluxTransformerBlock: _double_forward,
    FluxSingleTransformerBlock: _single_forward,
}


def _chunked(module: nn.Module) -> Callable[..., Any] | None:
    """The chunked forward of one of FLUX's blocks, None for another module.

    FSDP makes of a block's class a subclass, whose forward is the same.
    """
    for cls, forward in FORWARDS.items():
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return forward
    return None


def _finite(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.clip(-65504, 65504) if hidden.dtype == torch.float16 else hidden


def by_chunks(run: Run, length: int, tokens: int, *modules: nn.Module) -> torch.Tensor:
    """(batch, length, channels) of what `run` makes of slices of at most `tokens` tokens.

    modules: those that `run` calls.
    """
    count = math.ceil(length / tokens)
    if count <= 1:
        return run(slice(0, length))
    bounds = [length * index // count for index in range(count + 1)]

    def write() -> torch.Tensor:
        whole = None
        for start, stop in pairwise(bounds):
            part = run(slice(start, stop))
            if whole is None:
                whole = part.new_empty(part.shape[0], length, part.shape[2])
            whole[:, start:stop] = part
        assert whole is not None
        return whole

    return loaded_once(modules, write)


@functools.cache
def _check_forwards() -> None:
    """Compare the chunked forwards with the stock ones of the installed diffusers.

    Raises:
        ImportError: they differ.
    """
    # The process's own random numbers are others' too: a thread may be drawing noise.
    generator = torch.Generator().manual_seed(0)
    for cls, forward in FORWARDS.items():
        with torch.device("meta"):
            block = cls(8, num_attention_heads=1, attention_head_dim=8)
        block.attn = _StandIn()
        block.to_empty(device="cpu").double()
        with torch.device("cpu"), torch.no_grad():
            image, text, temb = (torch.empty(*size, 8).double() for size in ((2, 5), (2, 3), (2,)))
            for tensor in (*block.parameters(), image, text, temb):
                tensor.normal_(generator=generator)
            stock = block(image, text, temb)
            chunked = forward(block, text, image, temb, {}, 3)
        for expected, value in zip(stock, chunked, strict=True):
            if value.shape != expected.shape or not torch.allclose(value, expected):
                from importlib.metadata import version

                raise ImportError(
                    f"clear_dit does not know diffusers {version('diffusers')}: {cls.__name__} "
                    "computes something new; install the diffusers of constraints.txt, or a newer "
                    "clear_dit."
                )


class _StandIn(nn.Module):
    """In the place of an attention layer, of one with an IP-adapter in a double block."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        image_rotary_emb: None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if encoder_hidden_states is None:
            return hidden_states.sin()
        return hidden_states.sin(), encoder_hidden_states.cos(), hidden_states.tanh()
