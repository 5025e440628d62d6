"""CLEAR attention of image queries on Hopper: loads, products and softmax overlap.

A program owns 8x16 queries of one head as two tiles of 8x8, one for each of two groups of warps.
One more warp loads keys and values, for both groups at once, into a ring of stages: blocks of text,
of pooled keys, then the union of the groups' key tiles (lists.py). A group passes over the tiles
that it does not see. While it takes the softmax of one tile, the tensor cores make the scores of
its next. Softmax must stand between the products in the code: the compiler lets a group wait for
products at once where nothing else holds them up.

Barriers, one pair a stage: `full` when keys and values have landed, `empty` when both groups are
done with them. A group waits for `full` also of what it passes over: else it could be a round
ahead, where a barrier's parity says nothing. It holds a tile while it waits for its next, which is
at most `lists.WIDEST_STEP` further on in the stream: with more stages than that, the loads come to
it whatever the other group does, and there is no deadlock.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .shim import jit, load_tile, partition_barrier, view

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)
# Of a row that has met no key yet: finite, so that the first masked keys do no harm.
LOWEST: gl.constexpr = gl.constexpr(-1.0e38)
# Sides of a group's tile of queries, and of a tile of keys; tokens of either.
SIDE: gl.constexpr = gl.constexpr(8)
TOKENS: gl.constexpr = gl.constexpr(64)
# What hides keys of a tile from a group: the disc, the border.
DISC: gl.constexpr = gl.constexpr(1)
BORDER: gl.constexpr = gl.constexpr(2)


@jit
def first_of_block(block, blocks, length):
    """First token of a block of a run of `length`; the short block, if any, is block 0."""
    return gl.maximum(length - (blocks - block) * TOKENS, 0)


@jit
def keys_of_first(blocks, length):
    """How many keys of a run are in its block 0."""
    return length - (blocks - 1) * TOKENS


@jit
def load_stage(key, value, at, keys, values, full, stage, D: gl.constexpr):
    """Have one tile of keys and values loaded into a stage that is empty."""
    ready = full.index(stage)
    mbarrier.expect(ready, 4 * TOKENS * D)
    load_tile(key, at, ready, view(keys.index(stage), key))
    load_tile(value, at, ready, view(values.index(stage), value))


@jit
def produce(
    text_key, text_value, pooled_key, pooled_value, image_key, image_value, offsets, begin,
    text_length, pooled_length, text_blocks, dense, total,
    batch, head, tile_y, tile_x, keys, values, full, empty,
    D: gl.constexpr, POOLED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the stream: blocks of text, of pooled keys, then the tiles of the list from `begin`."""
    for at in range(text_blocks):
        stage = at % STAGES
        first = first_of_block(at, text_blocks, text_length)
        mbarrier.wait(empty.index(stage), at // STAGES & 1 ^ 1)
        load_stage(text_key, text_value, [batch, first, head, 0], keys, values, full, stage, D)
    if POOLED:
        for at in range(text_blocks, dense):
            stage = at % STAGES
            first = first_of_block(at - text_blocks, dense - text_blocks, pooled_length)
            mbarrier.wait(empty.index(stage), at // STAGES & 1 ^ 1)
            load_stage(
                pooled_key, pooled_value, [batch, first, head, 0], keys, values, full, stage, D
            )
    for at in range(dense, total):
        stage = at % STAGES
        entry = offsets + 2 * (begin + at - dense)
        y = tile_y + gl.load(entry).to(gl.int32)
        x = tile_x + gl.load(entry + 1).to(gl.int32)
        mbarrier.wait(empty.index(stage), at // STAGES & 1 ^ 1)
        load_stage(image_key, image_value, [batch, y, x, head, 0], keys, values, full, stage, D)


@jit
def unpack(item, dense):
    """(place in the stream, row, column, what hides keys) of an item of a list."""
    return (
        dense + item.to(gl.int16).to(gl.int32),
        (item >> 16).to(gl.int16).to(gl.int32),
        (item >> 32).to(gl.int16).to(gl.int32),
        (item >> 48).to(gl.int32),
    )


@jit
def pass_over(at, full, empty, STAGES: gl.constexpr):
    """Give back the stage of the tile `at` of the stream, unseen."""
    stage = at % STAGES
    mbarrier.wait(full.index(stage), at // STAGES & 1)
    mbarrier.arrive(empty.index(stage), count=1)


@jit
def hide(scores, hidden_by, own_y, own_x, y, x, height, width, radius2):
    """Scores, -inf for the keys of the tile at (y, x) that do not count for a query."""
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, scores.type.layout))
    row, column = token // SIDE, token % SIDE
    if hidden_by & DISC:
        dy = (own_y - y)[:, None] - row[None, :]
        dx = (own_x - x)[:, None] - column[None, :]
        scores = gl.where(dx * dx < radius2 - dy * dy, scores, float("-inf"))
    if hidden_by & BORDER:
        real_y = (row + y >= 0) & (row + y < height)
        # No tile begins left of the border.
        real_x = column + x < width
        scores = gl.where((real_y & real_x)[None, :], scores, float("-inf"))
    return scores


@jit
def add_bias(
    scores, bias, bias_token, block, blocks, length, scale_log2, BIAS: gl.constexpr
):  # fmt: skip
    """Scores of a block of a run of keys with their bias, if any; -inf where it has no key."""
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, scores.type.layout))
    real = (block > 0) | (token < keys_of_first(blocks, length))
    added = gl.where(real, 0.0, float("-inf"))
    if BIAS:
        place = (first_of_block(block, blocks, length) + token).to(gl.int64)
        found = gl.load(bias + place * bias_token, mask=real, other=0.0)
        # Scores are raw: what is added to them is scaled with them.
        added += found * (LOG2_E / scale_log2)
    return scores + added[None, :]


@jit
def sums_of_tile(x):
    """Sums over the rows of a tile of keys, [queries, 8]: those that a thread finds by itself."""
    return gl.sum(x.reshape([TOKENS, SIDE, SIDE]), 1)


@jit
def online_softmax(scores, row_max, scale_log2):
    """One step of softmax; `row_max` is of raw scores, so that one multiply-add scales and shifts.

    Returns the tile's unnormalised probabilities, the factor for what was summed before, their
    `sums_of_tile`, and the new maximum.
    """
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    factor = gl.exp2((row_max - new_max) * scale_log2)
    probability = gl.exp2(scores * scale_log2 - (new_max * scale_log2)[:, None])
    return probability, factor, sums_of_tile(probability), new_max


@jit
def rescale(x, factor):
    """Rows of `x` times `factor`, whatever its layout."""
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


@jit
def score(query, keys, stage, LAYOUT: gl.constexpr):
    """Begin the products of the group's queries with the keys of a stage."""
    zero = gl.zeros([TOKENS, TOKENS], gl.float32, LAYOUT)
    return warpgroup_mma(
        query, keys.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
    )


@jit
def attend(
    query, scores, acc, row_sums, row_max, keys, values, at, following, full, empty, scale_log2,
    SCORES: gl.constexpr, WEIGHTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend to the tile `at` by its scores, while those of the tile `following` are made.

    Returns the latter, what is summed and the maximum.
    """
    stage, ahead = at % STAGES, following % STAGES
    mbarrier.wait(full.index(ahead), following // STAGES & 1)
    ahead_scores = score(query, keys, ahead, SCORES)
    probability, factor, sums, row_max = online_softmax(scores, row_max, scale_log2)
    row_sums = rescale(row_sums, factor) + sums
    weights = gl.convert_layout(probability.to(values.dtype), WEIGHTS)
    acc = warpgroup_mma(weights, values.index(stage), rescale(acc, factor), is_async=True)
    scores, acc, _ = warpgroup_mma_wait(0, [ahead_scores, acc, weights])
    mbarrier.arrive(empty.index(stage), count=1)
    return scores, acc, row_sums, row_max


@jit
def consume(
    query, out, lse, bias, bias_token, lists, begin, end,
    text_length, pooled_length, text_blocks, dense, total, tile_y, tile_x, query_token,
    text_queries, heads, head_dim, height, width, query_start, query_stop,
    radius2, scale_log2, sign, queries, keys, values, full, empty,
    GROUP: gl.constexpr, D: gl.constexpr, EVEN_D: gl.constexpr, POOLED: gl.constexpr,
    BIAS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one group's tile of queries.

    begin, end: its part of `lists`.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    if tile_x + SIDE * GROUP >= width:
        for at in range(total):
            pass_over(at, full, empty, STAGES)
    else:
        token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, MEMORY))
        channel = gl.arange(0, D, layout=gl.SliceLayout(0, MEMORY))
        own_y = tile_y + token // SIDE
        own_x = tile_x + SIDE * GROUP + token % SIDE
        stored = ((own_y < query_stop) & (own_x < width))[:, None]
        # Beyond the border a token of the border stands in; it is not stored.
        own_y, own_x = gl.minimum(own_y, query_stop - 1), gl.minimum(own_x, width - 1)
        own = (text_queries + (own_y - query_start) * width + own_x).to(gl.int64)
        pointers = own[:, None] * query_token + channel[None, :]
        real = (channel < head_dim)[None, :]
        source = query + pointers
        q = gl.load(source) if EVEN_D else gl.load(source, mask=real, other=0.0)
        buffer = queries.index(GROUP)
        buffer.store((q * sign).to(q.dtype))
        fence_async_shared()
        partition_barrier()

        row = gl.arange(0, TOKENS, layout=ROWS)
        own_y = tile_y + row // SIDE
        own_x = tile_x + SIDE * GROUP + row % SIDE
        row_max = gl.full([TOKENS], 0.0, gl.float32, ROWS) + LOWEST / gl.maximum(scale_log2, 1.0)
        row_sums = sums_of_tile(gl.zeros([TOKENS, TOKENS], gl.float32, SCORES))
        acc = gl.zeros([TOKENS, D], gl.float32, OUT)

        at, y, x, hidden_by = 0, 0, 0, 0
        if dense == 0:
            at, y, x, hidden_by = unpack(gl.load(lists + begin), dense)
            begin += 1
        item = gl.load(lists + gl.minimum(begin, end - 1))
        if at > 0:
            pass_over(0, full, empty, STAGES)
        mbarrier.wait(full.index(at % STAGES), at // STAGES & 1)
        scores = warpgroup_mma_wait(0, [score(buffer, keys, at % STAGES, SCORES)])
        scores = hide(
            scores, hidden_by, own_y, own_x, tile_y + y, tile_x + x, height, width, radius2
        )
        if text_blocks > 0:
            scores = add_bias(
                scores, bias, bias_token, 0, text_blocks, text_length, scale_log2, False
            )
        elif POOLED:
            scores = add_bias(scores, bias, bias_token, 0, dense, pooled_length, scale_log2, BIAS)
        # By twos, so that scores stay in the registers where they are made.
        steps = gl.maximum(text_blocks - 1, 0)
        for pair in range(0, steps // 2):
            for second in gl.static_range(2):
                at = 2 * pair + second
                scores, acc, row_sums, row_max = attend(
                    buffer, scores, acc, row_sums, row_max, keys, values, at, at + 1, full, empty,
                    scale_log2, SCORES, WEIGHTS, STAGES,
                )  # fmt: skip
        if steps % 2 == 1:
            scores, acc, row_sums, row_max = attend(
                buffer, scores, acc, row_sums, row_max, keys, values, steps - 1, steps, full, empty,
                scale_log2, SCORES, WEIGHTS, STAGES,
            )  # fmt: skip
        if POOLED:
            for following in range(gl.maximum(text_blocks, 1), dense):
                scores, acc, row_sums, row_max = attend(
                    buffer, scores, acc, row_sums, row_max, keys, values, following - 1, following,
                    full, empty, scale_log2, SCORES, WEIGHTS, STAGES,
                )  # fmt: skip
                scores = add_bias(
                    scores, bias, bias_token, following - text_blocks, dense - text_blocks,
                    pooled_length, scale_log2, BIAS,
                )  # fmt: skip
        if dense > 0:
            at = dense - 1
        for entry in range(begin, end):
            following, y, x, hidden_by = unpack(item, dense)
            item = gl.load(lists + gl.minimum(entry + 1, end - 1))
            if following > at + 1:
                pass_over(at + 1, full, empty, STAGES)
            scores, acc, row_sums, row_max = attend(
                buffer, scores, acc, row_sums, row_max, keys, values, at, following, full, empty,
                scale_log2, SCORES, WEIGHTS, STAGES,
            )  # fmt: skip
            scores = hide(
                scores, hidden_by, own_y, own_x, tile_y + y, tile_x + x, height, width, radius2
            )
            at = following
        probability, factor, sums, row_max = online_softmax(scores, row_max, scale_log2)
        weights = gl.convert_layout(probability.to(q.dtype), WEIGHTS)
        acc = rescale(acc, factor)
        acc = warpgroup_mma(weights, values.index(at % STAGES), acc, is_async=True)
        acc, _ = warpgroup_mma_wait(0, [acc, weights])
        mbarrier.arrive(empty.index(at % STAGES), count=1)
        for rest in range(at + 1, total):
            pass_over(rest, full, empty, STAGES)

        row_sum = gl.convert_layout(gl.sum(rescale(row_sums, factor) + sums, 1), ROWS)
        acc = rescale(acc, 1.0 / row_sum)
        # By way of the queries' memory, so that whole rows are stored.
        buffer.store(acc.to(q.dtype))
        partition_barrier()
        pointers = own[:, None] * heads * head_dim + channel[None, :]
        gl.store(out + pointers, buffer.load(MEMORY), mask=stored if EVEN_D else stored & real)
        stored = (own_y < query_stop) & (own_x < width)
        own = (text_queries + (own_y - query_start) * width + own_x).to(gl.int64)
        logsumexp = (row_max * scale_log2 + gl.log2(row_sum)) * LN_2
        gl.store(lse + own * heads, logsumexp, mask=stored)


@jit
def image_forward(
    query, text_key, text_value, pooled_key, pooled_value, image_key, image_value, bias, out, lse,
    offsets, lists, ranges, row_class, column_class,
    query_batch, query_token, query_head, bias_token, bias_head,
    heads, head_dim, height, width, text_length, pooled_length, query_start, query_stop,
    text_queries, tiles_x, tiles, column_classes, radius2, scale_log2, sign,
    D: gl.constexpr, EVEN_D: gl.constexpr, POOLED: gl.constexpr, BIAS: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of all image queries; one program per 8x16 tile, head and batch item.

    query, out, lse: as in `forward.image_forward`. text_key, text_value: tensor descriptors of
    (batch, sequence, heads / GROUP, head_dim); image_key, image_value: of (batch, rows, columns,
    heads / GROUP, head_dim). scale_log2 > 0: of scores of the queries times `sign`, which is 1, -1
    or 0. LAYOUT: of a [64, D] tile in shared memory.
    """
    tile, plane = gl.program_id(0) % tiles, gl.program_id(0) // tiles
    batch, head = plane // heads, plane % heads
    tile_y, tile_x = query_start + tile // tiles_x * SIDE, tile % tiles_x * (2 * SIDE)
    wide_batch, wide_head = batch.to(gl.int64), head.to(gl.int64)
    query += wide_batch * query_batch + wide_head * query_head
    row = wide_batch * (text_queries + (query_stop - query_start) * width) * heads + head
    out += row * head_dim
    lse += row
    row_of_ranges = gl.load(row_class + tile // tiles_x) * column_classes
    entry = ranges + 6 * (row_of_ranges + gl.load(column_class + tile % tiles_x))
    begin, end = gl.load(entry), gl.load(entry + 1)
    text_blocks = (text_length + TOKENS - 1) // TOKENS
    dense = text_blocks + (pooled_length + TOKENS - 1) // TOKENS
    total = dense + end - begin

    dtype: gl.constexpr = query.dtype.element_ty
    keys = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, D], LAYOUT)
    values = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, D], LAYOUT)
    queries = gl.allocate_shared_memory(dtype, [2, TOKENS, D], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (
                query, out, lse, bias + wide_head * bias_head, bias_token,
                lists, gl.load(entry + 2), gl.load(entry + 3),
                text_length, pooled_length, text_blocks, dense, total, tile_y, tile_x,
                query_token, text_queries, heads, head_dim, height, width, query_start, query_stop,
                radius2, scale_log2, sign, queries, keys, values, full, empty,
                0, D, EVEN_D, POOLED, BIAS, STAGES,
            )),
            (consume, (
                query, out, lse, bias + wide_head * bias_head, bias_token,
                lists, gl.load(entry + 4), gl.load(entry + 5),
                text_length, pooled_length, text_blocks, dense, total, tile_y, tile_x,
                query_token, text_queries, heads, head_dim, height, width, query_start, query_stop,
                radius2, scale_log2, sign, queries, keys, values, full, empty,
                1, D, EVEN_D, POOLED, BIAS, STAGES,
            )),
            (produce, (
                text_key, text_value, pooled_key, pooled_value, image_key, image_value,
                offsets, begin, text_length, pooled_length, text_blocks, dense, total,
                batch, head // GROUP, tile_y, tile_x, keys, values, full, empty, D, POOLED, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
