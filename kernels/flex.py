"""CLEAR attention by PyTorch's FlexAttention on raster-order tokens, as the paper's code does it.

The block mask is made once per geometry: it lives on the `Window` value it belongs to (and goes
with it), so keep one `Window` for all layers and steps of an image.
"""

from __future__ import annotations

import functools
import shutil
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from .cells import ENDLESS, Comparisons, cell_count
from .pooling import pooled_bias, pooled_keys
from .window import Window

# Tokens per side of a block: FlexAttention's default.
BLOCK = 128
# Geometries and dtypes compiled in one process before torch.compile gives up.
COMPILED_SHAPES = 128


def why_not_flex(query: torch.Tensor, needs_grad: bool, return_lse: bool) -> str | None:
    """Why compiled FlexAttention cannot run on these inputs; None if it can."""
    device = query.device.type
    if device not in ("cpu", "cuda"):
        return f"needs a CPU or a CUDA device, got a query on {device!r}"
    if query.dtype == torch.float64:
        return "does not compile for float64"
    if device == "cuda":
        return None if find_spec("triton") else "needs Triton, which is not installed"
    if return_lse:
        return "cannot return the log-sum-exp on a CPU"
    if needs_grad:
        return "has no backward pass on a CPU"
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "needs a C++ compiler on a CPU (torch.compile)"
    return None


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: Window,
    *,
    scale: float,
    spatial_weight: torch.Tensor | None = None,
    far_offset: torch.Tensor | None = None,
    pooled: tuple[torch.Tensor, torch.Tensor] | None = None,
    return_lse: bool = False,
    compiled: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """FlexAttention under the window; arguments and results are those of `local_attention`.

    Args:
        compiled: False runs FlexAttention's eager form, which is dense and slow: for tests.
    """
    if pooled is None:
        pooled = pooled_keys(key, value, window, spatial_weight, scale)
    key, value = (torch.cat([x, part], dim=1) for x, part in zip((key, value), pooled, strict=True))
    bias = pooled_bias(window, query.shape[2], far_offset, query.device)
    run = _compiled_flex_attention() if compiled else torch_flex_attention
    with torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES):
        out, aux = run(
            *(tensor.transpose(1, 2) for tensor in (query, key, value)),
            score_mod=_score_mod(bias, key.shape[1]) if len(bias) else None,
            block_mask=block_mask(window, query.device),
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
            return_aux=AuxRequest(lse=return_lse),
        )
    return out.transpose(1, 2), aux.lse.transpose(1, 2) if return_lse else None


@functools.cache
def _compiled_flex_attention():
    # fullgraph: past the limit it raises, and does not silently compute densely.
    return torch.compile(torch_flex_attention, dynamic=False, fullgraph=True)


def _score_mod(bias: torch.Tensor, keys: int):
    """bias: (pooled, heads), of the last of the keys."""
    of_all = F.pad(bias.T, (keys - len(bias), 0))

    def score_mod(score, batch, head, query, key):
        return score + of_all[head, key]

    return score_mod


def block_mask(window: Window, device: torch.device) -> BlockMask:
    """The window as FlexAttention's block mask, remembered on the window itself."""
    made: dict[torch.device, BlockMask] = window.__dict__.setdefault("_block_masks", {})
    if device not in made:
        made[device] = _make_block_mask(window, device)
    return made[device]


def _make_block_mask(window: Window, device: torch.device) -> BlockMask:
    """One row of blocks at a time, and of the image keys only the rows within reach."""
    queries, keys = window.query_length, window.key_length + window.pooled_length
    skipped = window.text_length + window.query_rows[0] * window.width if window.query_rows else 0
    if window.far_levels:
        mask_mod = _far_mask_mod(window, skipped, device)
    else:
        mask_mod = _mask_mod(window, skipped)
    key_index = torch.arange(keys, device=device)
    block_count = -(-keys // BLOCK)
    # Counted per block: a last short block is full when all the keys it has are seen.
    sizes = torch.bincount(key_index // BLOCK, minlength=block_count)
    partial, full = [], []
    for start in range(0, queries, BLOCK):
        query_index = torch.arange(start, min(start + BLOCK, queries), device=device)
        first = skipped + start
        reachable = _reachable_keys(window, first, first + len(query_index) - 1, key_index)
        seen = mask_mod(0, 0, query_index[:, None], reachable[None, :]).sum(dim=0)
        counts = torch.zeros(block_count, dtype=seen.dtype, device=device)
        counts.index_add_(0, reachable // BLOCK, seen)
        is_full = counts == sizes * len(query_index)
        full.append(is_full)
        partial.append((counts > 0) & ~is_full)
    return BlockMask.from_kv_blocks(
        *_block_lists(torch.stack(partial)),
        *_block_lists(torch.stack(full)),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(queries, keys),
    )


def _reachable_keys(window: Window, first: int, last: int, keys: torch.Tensor) -> torch.Tensor:
    """Of all `keys`, those that queries first to last may see: all for text, else a strip."""
    text, width = window.text_length, window.width
    if first < text:
        return keys
    rows = range((first - text) // width, (last - text) // width + 1)
    found, begin = [keys[:text]], text
    for level in range(window.far_levels + 1):
        (start, stop), columns = window.given_rows(level), cell_count(width, level)
        seen = window.rows_in_reach(level, rows)
        low = begin + (max(seen.start, start) - start) * columns
        high = max(low, begin + (min(seen.stop, stop) - start) * columns)
        found.append(keys[low:high])
        begin += (stop - start) * columns
    return torch.cat([*found, keys[begin:]])


def _block_lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boolean (query blocks, key blocks) as counts and indices, with two leading axes."""
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts[None, None], indices.to(torch.int32)[None, None]


def _mask_mod(window: Window, skipped: int):
    """skipped: tokens before the first query."""
    text, end, width, radius2 = (
        window.text_length,
        window.sequence_length,
        window.width,
        window.disc_radius**2,
    )

    def mask_mod(batch, head, query, key):
        query = query + skipped
        query_token, key_token = query - text, key - text
        dy = query_token // width - key_token // width
        dx = query_token % width - key_token % width
        inside = dy * dy + dx * dx < radius2
        pooled = key >= end
        return (key < text) | torch.where(query < text, ~pooled, inside | pooled)

    return mask_mod


def _far_mask_mod(window: Window, skipped: int, device: torch.device):
    """By what is compared for every key; skipped: tokens before the first query."""
    text, end, width = window.text_length, window.key_length, window.width
    levels = [window.comparisons(level, device) for level in range(window.far_levels + 1)]
    parts = [torch.cat(parts) for parts in zip(*levels, strict=True)]
    # Text keys are within every reach.
    inner_y, inner_x, inner2, outer_y, outer_x, outer2 = (
        F.pad(part, (text, 0), value=ENDLESS if name == "outer2" else 0)
        for name, part in zip(Comparisons._fields, parts, strict=True)
    )

    def mask_mod(batch, head, query, key):
        query = query + skipped
        y, x = 2 * ((query - text) // width), 2 * ((query - text) % width)
        inner = (y - inner_y[key]) ** 2 + (x - inner_x[key]) ** 2
        outer = (y - outer_y[key]) ** 2 + (x - outer_x[key]) ** 2
        seen = (key < text) | ((inner >= inner2[key]) & (outer < outer2[key]))
        return torch.where(query < text, key < end, seen)

    return mask_mod


def executed_pairs(window: Window) -> int:
    """(query, key) pairs in the blocks FlexAttention visits; compare `Window.attended_pairs`."""
    mask = block_mask(window, torch.device("cpu"))
    blocks = mask.kv_num_blocks.sum()
    if mask.full_kv_num_blocks is not None:
        blocks = blocks + mask.full_kv_num_blocks.sum()
    return int(blocks) * BLOCK * BLOCK
