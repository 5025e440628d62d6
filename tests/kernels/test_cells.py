"""Far keys: every token once for every query, and what the window says of them."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.oracle import far_cells, far_mask_by_definition, far_means_by_definition

from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.cells import levels_needed
from clear_dit.kernels.pooling import pool_cell_rows, pool_cells, pooled_bias, shares
from clear_dit.kernels.window import Window

quick = settings(deadline=None, max_examples=40)
windows = st.builds(
    lambda height, width, text_length, radius, levels: Window(
        height, width, text_length, radius, far_levels=levels
    ),
    height=st.integers(1, 22),
    width=st.integers(1, 22),
    text_length=st.integers(0, 3),
    radius=st.integers(2, 9),
    levels=st.integers(1, 7),
)


@quick
@given(windows)
@example(Window(1, 1, 0, 2, far_levels=1))
@example(Window(17, 33, 0, 2, far_levels=6))
def test_mask_is_the_definition(window):
    mask = window.mask()
    assert torch.equal(mask, far_mask_by_definition(window))
    assert window.attended_pairs() == int(mask.sum())
    assert mask.shape == (window.sequence_length, window.key_length + window.pooled_length)


@quick
@given(windows)
def test_every_token_counts_once(window):
    """Alone or within one cell: the tokens that keys stand for are covered exactly."""
    text, image = window.text_length, window.image_length
    covered = torch.eye(image)
    for _, top, left, rows, columns in far_cells(window):
        cell = torch.zeros(window.height, window.width)
        cell[top : top + rows, left : left + columns] = 1
        covered = torch.cat([covered, cell.reshape(1, -1)])
    seen = window.mask()[text:, text:].float()
    assert torch.equal(seen @ covered, torch.ones(image, image))


@quick
@given(windows)
def test_pairs_level_by_level(window):
    text, start = window.text_length, window.sequence_length
    mask, pairs = window.mask()[text:], window.far_pairs()
    assert pairs[0] == int(mask[:, text:start].sum())
    for level in range(1, window.far_levels + 1):
        stop = start + window.cells_of_level(level)
        assert pairs[level] == int(mask[:, start:stop].sum())
        start = stop


@quick
@given(windows, st.data())
def test_pairs_of_some_rows(window, data):
    """Some rows of queries, some of tokens and of cells: rows and columns of the whole mask."""

    def some_rows(end, empty):
        start = data.draw(st.integers(0, end - 1))
        return start, data.draw(st.integers(start + (not empty), end))

    ends = [-(-window.height // 2**level) for level in range(window.far_levels + 1)]
    key_rows = tuple(some_rows(end, True) for end in ends)
    part = replace(window, query_rows=some_rows(window.height, False), key_rows=key_rows)
    text = window.text_length
    kept, begin = [torch.arange(text)], text
    for level, (start, stop) in enumerate(key_rows):
        columns = -(-window.width // 2**level)
        kept.append(torch.arange(begin + start * columns, begin + stop * columns))
        begin += ends[level] * columns
    queries = slice(*(text + row * window.width for row in part.query_rows))
    mask = window.mask()[queries][:, torch.cat(kept)]
    assert torch.equal(part.mask(), mask)
    assert part.attended_pairs() == int(mask.sum())


@pytest.mark.parametrize("between", [0, 1, 3])
@quick
@given(windows)
@example(Window(66, 5, 3, 2, far_levels=5))
def test_parts_are_the_image_queries(between, window):
    parts, mask = window.parts_by_position(between), window.image_queries.mask()
    text, image, *cells = mask.split(
        [
            window.text_length,
            window.key_length - window.text_length,
            *map(window.cells_of_level, range(1, window.far_levels + 1)),
        ],
        dim=1,
    )
    levels = window.levels_by_position(between)
    assert [level for own in levels for level in own] == list(range(window.far_levels + 1))
    for part, own in zip(parts, [own for own in levels if own], strict=True):
        in_front = [text] if own is levels[-1] else []
        seen = [image if level == 0 else cells[level - 1] for level in own]
        assert torch.equal(part.mask(), torch.cat([*in_front, *seen], dim=1))
    pairs = sum(part.attended_pairs() for part in parts)
    assert pairs == window.image_queries.attended_pairs()


def test_levels_by_position():
    """Of radius 4: level l ends 4 * 2^l tokens away."""
    window = Window(128, 128, 0, 4, far_levels=10)
    near, far = window.levels_by_position()
    assert (near, far) == (range(4), range(4, 11))  # up to 32 tokens, a quarter of the side
    assert window.levels_by_position(1) == [range(4), range(4, 5), range(5, 11)]
    # Where the trained extent is an eighth of the side, 16 tokens.
    assert window.levels_by_position(2) == [range(3), range(3, 4), range(4, 5), range(5, 11)]
    few = Window(128, 128, 0, 4, far_levels=2)  # the last has no end
    assert few.levels_by_position(1) == [range(2), range(2, 2), range(2, 3)]


@quick
@given(windows, st.data())
def test_rows_in_reach_hold_all_that_is_seen(window, data):
    start = data.draw(st.integers(0, window.height - 1))
    rows = range(start, data.draw(st.integers(start + 1, window.height)))
    queries = slice(rows.start * window.width, rows.stop * window.width)
    begin, mask = window.text_length, window.mask()[window.text_length :][queries]
    for level in range(window.far_levels + 1):
        side = 2**level
        columns = -(-window.width // side)
        count = -(-window.height // side) * columns
        seen = mask[:, begin : begin + count].any(0).nonzero() // columns
        reach = window.rows_in_reach(level, rows)
        assert not len(seen) or (reach.start <= seen.min() and seen.max() < reach.stop)
        begin += count


@quick
@given(windows, st.booleans(), st.sampled_from([0.3, 1e3]))
def test_cells_are_means_weighted_by_the_length_of_keys(window, weighted, scale):
    """Gradients too, of the keys also by way of the weights; no size of the keys overflows."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, window.sequence_length, 2, 3)
    key, value = torch.randn(shape, generator=generator, dtype=torch.float64)
    leaves = [key.requires_grad_(), value.requires_grad_()]
    weight = None
    if weighted:
        weight = torch.rand(window.far_levels, 2, 2, dtype=torch.float64, generator=generator)
        leaves.append(weight.requires_grad_())
    sizes = window.height, window.width, window.far_levels
    pooled = pool_cells(*(x[:, window.text_length :] for x in (key, value)), weight, *sizes, scale)
    expected = [far_means_by_definition(x, key, window, scale, weight) for x in (key, value)]
    grads = torch.randn(2, *pooled[0].shape, generator=generator, dtype=torch.float64).unbind()
    ours, theirs = (torch.autograd.grad(list(x), leaves, grads) for x in (pooled, expected))
    for one, other in zip((*pooled, *ours), (*expected, *theirs), strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-7, atol=1e-7 * float(other.detach().abs().max())
        )


@quick
@given(windows, st.booleans(), st.sampled_from([0.3, 1e3]), st.data())
def test_parts_of_cells_times_their_shares_are_the_cells(window, weighted, scale, data):
    """Bands that begin anywhere, at odd rows too."""
    height, width, levels = window.height, window.width, window.far_levels
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 2, height * width, 2, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(levels + 1, 2, 2, generator=generator) if weighted else None
    cuts = data.draw(st.sets(st.integers(0, height)))
    bands = list(pairwise(sorted({0, height, *cuts})))
    made = [
        pool_cell_rows(
            *image[:, :, start * width : stop * width],
            weight, width, levels, scale, range(start, stop),
        )
        for start, stop in bands
    ]  # fmt: skip
    whole = [image.new_empty(2, 2, 0, 2, 3)]
    for level, parts in enumerate(zip(*made, strict=True), 1):
        shape = len(bands), 2, -(-height // 2**level), -(-width // 2**level), 2
        key, value = image.new_zeros(2, *shape, 3)
        largest, mass = image.new_full(shape, -torch.inf), image.new_zeros(shape)
        for band, ((start, stop), part) in enumerate(zip(bands, parts, strict=True)):
            rows = band, slice(None), slice(start // 2**level, -(-stop // 2**level))
            for every, own in zip((key, value, largest, mass), part, strict=True):
                every[rows] = own
        share, *_ = shares(largest, mass)
        cells = [(x * share[..., None]).sum(0).flatten(1, 2) for x in (key, value)]
        whole.append(torch.stack(cells))
    expected = pool_cells(*image, weight, height, width, levels, scale)
    torch.testing.assert_close(torch.cat(whole, 2), torch.stack(expected))


@quick
@given(windows)
@example(Window(16, 1, 0, 16, far_levels=7))
@example(Window(12, 12, 0, 4, far_levels=7))
def test_coarser_levels_than_needed_are_seen_by_nobody(window):
    needed = levels_needed(window.height, window.width, window.disc_radius)
    assert not any(window.far_pairs()[needed + 1 :])
    diagonal2 = window.height**2 + window.width**2
    assert needed == 1 or (window.disc_radius * 2 ** (needed - 1)) ** 2 <= diagonal2


def test_more_levels_than_the_grid_needs_change_nothing():
    tensors = torch.randn(3, 2, 5 + 13 * 18, 2, 16)
    enough, more = (
        local_attention(*tensors, Window(13, 18, 5, 3, far_levels=levels), impl="reference")
        for levels in (3, 9)
    )
    torch.testing.assert_close(enough, more)


@pytest.mark.parametrize("window", [Window(9, 14, 5, 17), Window(9, 14, 5, 10**9)])
def test_past_the_diagonal_it_is_full_attention(window):
    far = Window(9, 14, 5, window.radius, far_levels=5)
    tensors = torch.randn(3, 2, window.sequence_length, 2, 16)
    out = local_attention(*tensors, far, impl="reference")
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors))
    torch.testing.assert_close(out, dense.transpose(1, 2))


def test_equal_keys_are_as_in_full_attention():
    """Where all keys of the image are alike, a cell is as good as its tokens: the log counts."""
    window = Window(21, 30, 3, 2, far_levels=5)
    query, value = torch.randn(2, 1, window.sequence_length, 2, 16)
    key = torch.randn(1, 1, 2, 16).expand_as(query)
    out = local_attention(query, key, value, window, impl="reference")
    full = value.mean(1, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, full, rtol=1e-4, atol=1e-5)


def test_counts_of_pooled_keys():
    bias = pooled_bias(Window(5, 7, 2, 3, 4, pooled_weight="count"), 2, None, torch.device("cpu"))
    assert bias.exp().round().tolist() == [[n] * 2 for n in (16, 12, 4, 3)]
    assert not len(pooled_bias(Window(5, 7, 2, 3, 4), 2, None, torch.device("cpu")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(far_levels=-1), "far_levels must be at least 0"),
        (dict(far_levels=17), "more than the grid needs are as good as enough"),
        (dict(far_levels=2, down_factor=2), "exclude each other, got 2 and 2"),
        (dict(far_levels=2, radius=1), "radius of at least 2 tokens, got 1"),
        (dict(far_levels=2, width=2**14), "at most 16384 rows and columns"),
        (dict(pooled_weight="two"), "pooled_weight must be one or count, got 'two'"),
        (dict(pooled_weight="count"), "needs a down_factor above 1"),
        (dict(key_rows=((0, 8),), query_rows=(0, 2)), "come with query_rows and far_levels"),
        (dict(key_rows=((0, 8), (0, 4)), far_levels=1), "come with query_rows and far_levels"),
        (
            dict(key_rows=((0, 8), (0, 5)), query_rows=(0, 2), far_levels=1),
            "within ((0, 8), (0, 4))",
        ),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Window(**(dict(height=8, width=8, text_length=1, radius=3) | arguments))
