"""What CLEAR's own implementations are measured against: dense attention, another window, tiles.

A peer says what it computes (`sees`), so that it is checked against its own definition before it is
timed, and how many (query, key) pairs it computes for that.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from ..kernels import flex
from ..kernels.window import Window
from .executed import triton_keys

# (window, queries [n]) -> bool [n, text + image + pooled], on the device of `queries`.
Sees = Callable[[Window, torch.Tensor], torch.Tensor]
# Of `flex-tiled`, in tokens: FlexAttention's block of 128 as a piece of the image.
TILE_ROWS, TILE_COLUMNS = 8, 16


@dataclass(frozen=True)
class Peer:
    """An implementation in the benchmark.

    Attributes:
        why_not: (query, window, needs_grad) -> why it cannot run, in a few words; None if it can.
        run: (query, key, value, window) -> output; (batch, text + image, heads, head_dim) each.
        sees: who attends to whom.
        executed_pairs: (query, window) -> (query, key) pairs computed for a head, masked ones
            included.
        order: window -> the tokens in the order `run` takes them, int64 (text + image); None for
            text first, then the image in raster order.
        find_lse: as `run`, the natural-log log-sum-exp of the scaled scores, (batch, text + image,
            heads), or None where it is not to be had; None if it never is.
    """

    why_not: Callable[[torch.Tensor, Window, bool], str | None]
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Window], torch.Tensor]
    sees: Sees
    executed_pairs: Callable[[torch.Tensor, Window], float]
    order: Callable[[Window], torch.Tensor] | None = None
    find_lse: (
        Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Window], torch.Tensor | None] | None
    ) = None


def sees_window(window: Window, queries: torch.Tensor) -> torch.Tensor:
    """CLEAR's window: these rows of `Window.mask()`."""

    def inside(y, x, key_y, key_x):
        return (y - key_y) ** 2 + (x - key_x) ** 2 < window.disc_radius**2

    if window.far_levels:
        return _rows_of_far_mask(window, queries)
    return _rows_of_mask(window, queries, inside)


def _rows_of_far_mask(window: Window, queries: torch.Tensor) -> torch.Tensor:
    text = window.text_length
    of_text = (queries < text)[:, None]
    place = (queries - text).clamp(min=0)[:, None]
    y, x = place // window.width, place % window.width
    seen = [
        window.comparisons(level, queries.device).seen(y, x)
        for level in range(window.far_levels + 1)
    ]
    seen[0] |= of_text
    seen[1:] = [each & ~of_text for each in seen[1:]]
    return torch.cat([of_text.new_ones(len(queries), text), *seen], dim=1)


def sees_everything(window: Window, queries: torch.Tensor) -> torch.Tensor:
    """Full attention; there are no pooled keys in it."""
    keys = torch.arange(window.sequence_length + window.pooled_length, device=queries.device)
    return (keys < window.sequence_length).expand(len(queries), -1)


def sees_square(window: Window, queries: torch.Tensor) -> torch.Tensor:
    """The square around the disc; at a border it is moved inside, not cut (NATTEN's window)."""
    side = _side(window)

    def inside(y, x, key_y, key_x):
        top = (y - side // 2).clamp(0, window.height - side)
        left = (x - side // 2).clamp(0, window.width - side)
        rows = (top <= key_y) & (key_y < top + side)
        return rows & (left <= key_x) & (key_x < left + side)

    return _rows_of_mask(window, queries, inside)


def _rows_of_mask(
    window: Window, queries: torch.Tensor, inside: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Rows of a mask in which `inside` tells image queries and keys apart, by row and column."""
    text, sequence = window.text_length, window.sequence_length
    of_text = (queries < text)[:, None]
    place = (queries - text).clamp(min=0)[:, None]
    token = torch.arange(window.image_length, device=queries.device)
    seen = torch.ones(
        len(queries), sequence + window.pooled_length, dtype=torch.bool, device=queries.device
    )
    width = window.width
    near = inside(place // width, place % width, token // width, token % width)
    seen[:, text:sequence] = near | of_text
    seen[:, sequence:] = ~of_text
    return seen


def triton_pairs(query: torch.Tensor, window: Window) -> float:
    """Of the Triton kernels, with the pinned entry of the tables or else the first that fits.

    Text queries count what they attend to.
    """
    from ..kernels.triton import tables, tuning
    from ..kernels.triton.launch import table_key

    key = table_key(query.device, query.dtype, query.shape[-1])
    entries = tables.forward_configs(*key, far=window.far_levels > 0)
    pin = os.environ.get(tuning.PIN)
    entry = next((entry for entry in entries if entry.name == pin), entries[0])
    listed = 0 if isinstance(entry, tables.GluonConfig) else entry.far_keys
    keys = triton_keys(window, entry.tiling, entry.dense_keys, listed)
    return keys * window.image_length + window.text_length * window.sequence_length


def raster_pairs(query: torch.Tensor, window: Window) -> int:
    """Of FlexAttention on raster-order tokens."""
    return _pairs(flex.block_mask(window, query.device))


def _pairs(mask: BlockMask) -> int:
    blocks = mask.kv_num_blocks.sum()
    if mask.full_kv_num_blocks is not None:
        blocks = blocks + mask.full_kv_num_blocks.sum()
    return int(blocks) * flex.BLOCK**2


def _dense_pairs(query: torch.Tensor, window: Window) -> int:
    return window.sequence_length**2


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    backend: SDPBackend | None = None,
) -> torch.Tensor:
    """Full attention by PyTorch; it takes the backend it likes best where None."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _runs_everywhere(query: torch.Tensor, window: Window, needs_grad: bool) -> None:
    """Never refuses."""


def _needs_cuda(query: torch.Tensor) -> str | None:
    if query.device.type == "cuda":
        return None
    return f"needs a CUDA device, got a query on {query.device.type!r}"


def _needs_package(name: str, query: torch.Tensor) -> str | None:
    if find_spec(name) is None:
        return f"needs the package {name}, which is not installed"
    return _needs_cuda(query)


def _why_not_backend(
    backend: SDPBackend, query: torch.Tensor, window: Window, needs_grad: bool
) -> str | None:
    if reason := _needs_cuda(query):
        return reason
    heads_first = query.detach().transpose(1, 2).requires_grad_(needs_grad)
    inputs = torch.backends.cuda.SDPAParams(
        heads_first, heads_first, heads_first, None, 0.0, False, False
    )
    usable = {
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
    }[backend]
    with sdpa_kernel(backend):
        if usable(inputs):
            return None
    return f"does not take {query.dtype} with head_dim {query.shape[-1]} on this device"


def _sdpa_peer(backend: SDPBackend) -> Peer:
    return Peer(
        partial(_why_not_backend, backend),
        partial(_dense, backend=backend),
        sees_everything,
        _dense_pairs,
    )


def _why_not_xformers(query: torch.Tensor, window: Window, needs_grad: bool) -> str | None:
    return _needs_package("xformers", query)


def _xformers(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: Window
) -> torch.Tensor:
    """Full attention by xformers; its layout is ours."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value)


def _side(window: Window) -> int:
    """Of the square around the disc."""
    return 2 * window.radius - 1


def _why_not_natten(query: torch.Tensor, window: Window, needs_grad: bool) -> str | None:
    if reason := _needs_package("natten", query):
        return reason
    if window.pooled_length:
        return "has no pooled keys"
    side, shorter = _side(window), min(window.height, window.width)
    if not 1 < side <= shorter:
        return f"takes a square of 2 to {shorter} tokens a side, got {side}"
    return None


def _natten(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: Window
) -> torch.Tensor:
    """Image queries by NATTEN with the text as additional keys, text queries by PyTorch."""
    from natten import na2d

    text = window.text_length
    image = [x[:, text:].unflatten(1, (window.height, window.width)) for x in (query, key, value)]
    side = _side(window)
    words = {"additional_keys": key[:, :text], "additional_values": value[:, :text]}
    out = na2d(*image, kernel_size=(side, side), **(words if text else {})).flatten(1, 2)
    return torch.cat([_dense(query[:, :text], key, value, window), out], dim=1) if text else out


def _square_pairs(query: torch.Tensor, window: Window) -> int:
    text = window.text_length
    return text * window.sequence_length + window.image_length * (text + _side(window) ** 2)


def _why_not_tiled_flex(query: torch.Tensor, window: Window, needs_grad: bool) -> str | None:
    if reason := flex.why_not_flex(query, needs_grad, False):
        return reason
    if window.pooled_length:
        return "has no pooled keys"
    if window.height % TILE_ROWS or window.width % TILE_COLUMNS:
        return (
            f"needs a grid of whole {TILE_ROWS} x {TILE_COLUMNS} tiles, got {window.height} x "
            f"{window.width} tokens"
        )
    return None


def _why_not_flash_flex(query: torch.Tensor, window: Window, needs_grad: bool) -> str | None:
    if reason := _why_not_tiled_flex(query, window, needs_grad):
        return reason
    reason = _needs_package("flash_attn", query)
    if reason is None and find_spec("flash_attn.cute") is None:
        return "needs flash_attn with its kernels in CuTe, which is not installed"
    return reason


def tile_order(window: Window) -> torch.Tensor:
    """Tokens tile by tile, a tile in raster order; the text last, so that tiles are blocks."""
    text = window.text_length
    tokens = torch.arange(text, window.sequence_length).view(
        window.height // TILE_ROWS, TILE_ROWS, window.width // TILE_COLUMNS, TILE_COLUMNS
    )
    return torch.cat([tokens.transpose(1, 2).flatten(), torch.arange(text)])


def tiled_flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    compiled: bool = True,
    backend: Literal["AUTO", "FLASH"] = "AUTO",
) -> torch.Tensor:
    """FlexAttention under the disc, on tokens in `tile_order`.

    Args:
        compiled: False runs FlexAttention's eager form, which is dense and slow: for tests.
        backend: FlexAttention's kernel; "FLASH" is FlashAttention's.
    """
    run = flex._compiled_flex_attention() if compiled else torch_flex_attention
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    with torch._dynamo.config.patch(recompile_limit=flex.COMPILED_SHAPES):
        out = run(
            query, key, value, block_mask=_tiled_mask(window, query.device),
            kernel_options=None if backend == "AUTO" else {"BACKEND": backend},
        )  # fmt: skip
    return out.transpose(1, 2)


@functools.lru_cache(maxsize=2)
def _tiled_mask(window: Window, device: torch.device) -> BlockMask:
    """Which tiles see which: all, some or none of their tokens, by the distances of rectangles."""
    image, width, radius2 = window.image_length, window.width, window.disc_radius**2
    tiles_x = width // TILE_COLUMNS

    def place(token):
        tile, inner = token // flex.BLOCK, token % flex.BLOCK
        y = tile // tiles_x * TILE_ROWS + inner // TILE_COLUMNS
        return y, tile % tiles_x * TILE_COLUMNS + inner % TILE_COLUMNS

    def mask_mod(batch, head, query, key):
        (y, x), (key_y, key_x) = place(query), place(key)
        dy, dx = y - key_y, x - key_x
        return (query >= image) | (key >= image) | (dy * dy + dx * dx < radius2)

    tiles = torch.arange(image // flex.BLOCK, device=device)
    dy = (tiles[:, None] // tiles_x - tiles // tiles_x).abs() * TILE_ROWS
    dx = (tiles[:, None] % tiles_x - tiles % tiles_x).abs() * TILE_COLUMNS
    farthest = (dy + TILE_ROWS - 1) ** 2 + (dx + TILE_COLUMNS - 1) ** 2
    nearest = (dy - TILE_ROWS + 1).clamp(min=0) ** 2 + (dx - TILE_COLUMNS + 1).clamp(min=0) ** 2
    blocks = -(-window.sequence_length // flex.BLOCK)
    full = torch.ones(blocks, blocks, dtype=torch.bool, device=device)
    some = torch.zeros_like(full)
    full[: len(tiles), : len(tiles)] = farthest < radius2
    some[: len(tiles), : len(tiles)] = (nearest < radius2) & (farthest >= radius2)
    return BlockMask.from_kv_blocks(
        *flex._block_lists(some),
        *flex._block_lists(full),
        BLOCK_SIZE=flex.BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(window.sequence_length, window.sequence_length),
    )


def _tiled_flex_pairs(query: torch.Tensor, window: Window) -> int:
    return _pairs(_tiled_mask(window, query.device))


# By the name the command line knows. "sdpa" is what a FLUX pipeline runs without CLEAR.
PEERS = {
    "sdpa": Peer(_runs_everywhere, _dense, sees_everything, _dense_pairs),
    "sdpa-cudnn": _sdpa_peer(SDPBackend.CUDNN_ATTENTION),
    "sdpa-flash": _sdpa_peer(SDPBackend.FLASH_ATTENTION),
    "xformers": Peer(_why_not_xformers, _xformers, sees_everything, _dense_pairs),
    "natten": Peer(_why_not_natten, _natten, sees_square, _square_pairs),
    "flex-tiled": Peer(
        _why_not_tiled_flex, tiled_flex_attention, sees_window, _tiled_flex_pairs, tile_order
    ),
    "flex-flash": Peer(
        _why_not_flash_flex,
        partial(tiled_flex_attention, backend="FLASH"),
        sees_window,
        _tiled_flex_pairs,
        tile_order,
    ),
}
