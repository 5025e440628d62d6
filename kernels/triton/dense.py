"""Attention of text queries, which see the whole sequence: keys split over programs, then merged.

Text is a few hundred rows against hundreds of thousands of keys: too few programs, were each to
walk all the keys. The parts join exactly, by their log-sum-exp (merge.py has the formula).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import attend_run
from .primitives import LN_2, LOWEST, load_rows, store_rows


@triton.jit
def text_forward(
    query, key, value, part_out, part_lse,
    query_batch, query_token, query_head, key_batch, key_token, key_head,
    value_batch, value_token, value_head,
    heads, head_dim, text_length, sequence, keys_per_split, blocks, planes, scale_log2,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr,
    NEGATIVE: tl.constexpr, DESCRIPTOR: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of text queries against one split of the keys, which have heads / GROUP heads.

    key, value: tensor descriptors where DESCRIPTOR, else pointers to the first token; part_out:
    float32 (splits, batch, text, heads, head_dim); part_lse: float32 (splits, batch, text, heads),
    in units of log2. NEGATIVE: the scale is that of the negated queries.
    """
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    plane, split = rest % planes, rest // planes
    item, place = plane // heads, plane % heads
    batch, head = item.to(tl.int64), place.to(tl.int64)
    own_key_head = place // GROUP
    tokens = block * M + tl.arange(0, M)
    valid = tokens < text_length
    if not DESCRIPTOR:
        wide_key_head = own_key_head.to(tl.int64)
        key += batch * key_batch + wide_key_head * key_head
        value += batch * value_batch + wide_key_head * value_head
    q = load_rows(
        query + batch * query_batch + head * query_head, query_token, tokens, valid, head_dim,
        D, EVEN_D,
    )  # fmt: skip
    if NEGATIVE:
        q = -q

    row_max = tl.full([M], LOWEST, tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, sequence)
    row_max, row_sum, acc = attend_run(
        q, row_max, row_sum, acc, key, value, key_token, value_token, item, own_key_head,
        begin, end, scale_log2, head_dim, None, 0, N, D, EVEN_D, False, False, DESCRIPTOR, STAGES,
    )  # fmt: skip

    row = (split.to(tl.int64) * (planes // heads) + batch) * text_length * heads + head
    store_rows(
        part_out + row * head_dim, heads * head_dim, tokens, valid, acc / row_sum[:, None],
        head_dim, D, EVEN_D,
    )  # fmt: skip
    logsumexp = row_max + tl.log2(row_sum)
    tl.store(part_lse + row + tokens.to(tl.int64) * heads, logsumexp, mask=valid)


@triton.jit
def text_merge(
    part_out, part_lse, out, lse, rows, text_rows, sequence_rows, splits, head_dim,
    M: tl.constexpr, D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Join the splits. A row is one text query of one head; `rows` of them, `text_rows` an item."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    valid = row < rows
    row_max = tl.full([M], LOWEST, tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    source = row.to(tl.int64)
    for _ in range(splits):
        part_max = tl.load(part_lse + source, mask=valid, other=LOWEST)
        part = load_rows(part_out, head_dim, source, valid, head_dim, D, EVEN_D)
        new_max = tl.maximum(row_max, part_max)
        factor, weight = tl.exp2(row_max - new_max), tl.exp2(part_max - new_max)
        acc = acc * factor[:, None] + part * weight[:, None]
        row_sum, row_max = row_sum * factor + weight, new_max
        source += rows
    target = (row // text_rows).to(tl.int64) * sequence_rows + row % text_rows
    store_rows(out, head_dim, target, valid, acc / row_sum[:, None], head_dim, D, EVEN_D)
    tl.store(lse + target, (row_max + tl.log2(row_sum)) * LN_2, mask=valid)
