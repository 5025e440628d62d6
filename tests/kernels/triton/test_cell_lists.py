"""The lists of far keys against the window's mask, and how much more than needed they hold."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clear_dit.kernels.cells import cell_count
from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.triton import cell_lists, resident, tables
from clear_dit.kernels.triton.cell_lists import (
    executed_far_keys,
    key_comparisons,
    key_lists,
    of_lists,
    query_lists,
)
from clear_dit.kernels.triton.geometry import Tiling
from clear_dit.kernels.window import Window

CPU = torch.device("cpu")
TILINGS = (Tiling(8, 8, 8, 8), Tiling(4, 8, 4, 4), Tiling(2, 16, 8, 2))
STEP = 16


@st.composite
def windows(draw, parts=False):
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    levels = draw(st.integers(1, 6))
    whole = Window(height, width, 0, draw(st.integers(2, 30)), far_levels=levels)
    if not parts:
        return whole

    def stretch(length, least):
        start = draw(st.integers(0, length - least))
        return start, draw(st.integers(start + least, length))

    rows = tuple(stretch(cell_count(height, level), 0) for level in range(levels + 1))
    return replace(whole, query_rows=stretch(height, 1), key_rows=rows)


def masks(window):
    """The window's mask by rows and columns of queries, and the given keys' numbers in order."""
    start, stop = window.image_query_rows
    return window.mask().unflatten(0, (stop - start, window.width))


@settings(max_examples=60, deadline=None)
@given(window=windows(parts=True), tiling=st.sampled_from(TILINGS), whole=st.booleans())
@example(window=Window(24, 23, 0, 2, far_levels=6), tiling=TILINGS[0], whole=True)
@example(window=Window(1, 1, 0, 2, far_levels=1), tiling=TILINGS[1], whole=True)
def test_every_key_that_a_tile_sees_is_listed_once(window, tiling, whole):
    if whole:
        window = replace(window, query_rows=None, key_rows=None)
    lists = key_lists(of_lists(Geometry.of(window, 1.0)), tiling.rows, tiling.columns, STEP, CPU)
    mask, token_keys = masks(window), window.cells_of_level(0)
    columns = -(-window.width // tiling.columns)
    assert len(lists.ranges) == columns * -(-len(mask) // tiling.rows)
    for tile, (begin, border, end) in enumerate(lists.ranges.tolist()):
        y, x = tile // columns * tiling.rows, tile % columns * tiling.columns
        seen = mask[y : y + tiling.rows, x : x + tiling.columns].flatten(0, 1)
        listed = lists.keys[begin:end].long()
        assert len(listed.unique()) == len(listed)
        assert set(seen.any(0).nonzero().flatten().tolist()) <= set(listed.tolist())
        assert (border - begin) % STEP == 0
        assert seen[:, listed[: border - begin]].all()
        assert int(seen[:, listed].all(0).sum()) - (border - begin) < STEP
        assert int((listed < token_keys).sum()) == lists.tokens[tile]


@settings(max_examples=30, deadline=None)
@given(window=windows(), tiling=st.sampled_from(TILINGS))
@example(window=Window(24, 23, 0, 2, far_levels=6), tiling=TILINGS[0])
def test_every_query_that_sees_a_tile_of_cells_is_listed_once(window, tiling):
    geometry, mask, first = of_lists(Geometry.of(window, 1.0)), masks(window), 0
    tiles_x = -(-window.width // tiling.step_columns)
    for level in range(window.far_levels + 1):
        rows, columns = cell_count(window.height, level), cell_count(window.width, level)
        cells = mask[..., first : first + rows * columns].unflatten(2, (rows, columns))
        first += rows * columns
        lists = query_lists(geometry, level, tiling, CPU)
        across = -(-columns // tiling.columns)
        assert len(lists.ranges) - 1 == across * -(-rows // tiling.rows)
        assert lists.longest == int(lists.ranges.diff().max())
        for owner in range(len(lists.ranges) - 1):
            y, x = owner // across * tiling.rows, owner % across * tiling.columns
            sees = cells[:, :, y : y + tiling.rows, x : x + tiling.columns].any(-1).any(-1)
            visited = torch.zeros_like(sees, dtype=torch.int)
            for number in lists.tiles[slice(*lists.ranges[owner : owner + 2].tolist())].tolist():
                top, left = number // tiles_x * tiling.step_rows, number % tiles_x
                left *= tiling.step_columns
                visited[top : top + tiling.step_rows, left : left + tiling.step_columns] += 1
            assert visited.max() <= 1
            assert visited[sees].all()


def test_comparisons_are_in_the_order_of_the_lists():
    window = Window(13, 9, 4, 3, query_rows=(2, 7), far_levels=2, key_rows=((1, 9), (0, 5), (2, 4)))
    table = key_comparisons(of_lists(Geometry.of(window, 0.3)), CPU)
    expected = [torch.stack(window.comparisons(level)) for level in range(3)]
    assert table.dtype == torch.int32
    assert torch.equal(table, torch.cat(expected, dim=1))


def test_a_large_image_is_listed_part_by_part(monkeypatch):
    geometry = of_lists(Geometry.of(Window(40, 33, 0, 3, far_levels=6), 1.0))
    whole = key_lists(geometry, 8, 8, STEP, CPU), query_lists(geometry, 1, TILINGS[0], CPU)
    monkeypatch.setattr(resident, "_residents", resident.Residents())
    monkeypatch.setattr(cell_lists, "CANDIDATES", 5000)
    parts = key_lists(geometry, 8, 8, STEP, CPU), query_lists(geometry, 1, TILINGS[0], CPU)
    for one, other in zip(whole, parts, strict=True):
        assert all(
            torch.equal(getattr(one, name), getattr(other, name))
            for name in vars(one)
            if name != "longest"
        )


@pytest.mark.parametrize("radius", [4, 8])
@pytest.mark.parametrize(
    "entry", dict.fromkeys(entries[0] for entries in tables.FORWARD.values()), ids=lambda e: e.name
)
def test_executed_over_exact_at_8192_px(radius, entry):
    window = Window(512, 512, 512, radius, far_levels=10)
    tokens, cells = executed_far_keys(window, entry.tiling, entry.far_keys)
    near, *far = (pairs / window.image_length for pairs in window.far_pairs())
    assert cells <= 1.8 * sum(far)
    # A tile of 8 x 8 sees 4 times the tokens that a query of it sees, and 5 with what fills up.
    assert tokens <= {4: 5.1, 8: 2.6}[radius] * near


def test_what_the_gradients_execute_at_8192_px():
    """More than the forward pass: the query tiles around 8 x 8 cells are many."""
    tiling = tables.BACKWARD["sm_90"].far_key.tiling
    for radius, most in ((4, 5.1), (8, 3.1)):
        window = Window(512, 512, 512, radius, far_levels=10)
        geometry = of_lists(Geometry.of(window, 1.0))
        visited = sum(
            query_lists(geometry, level, tiling, CPU).tiles.numel() for level in range(1, 11)
        )
        pairs = visited * tiling.rows * tiling.columns * tiling.step_rows * tiling.step_columns
        assert pairs <= most * sum(window.far_pairs()[1:])
