"""The lists of key tiles against brute force over all pairs of tokens."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clear_dit.bench.executed import exact_keys
from clear_dit.kernels.triton.geometry import Tiling, executed_keys, visits
from clear_dit.kernels.window import Window

CPU = torch.device("cpu")
TILINGS = (Tiling(8, 8, 8, 8), Tiling(4, 8, 4, 4), Tiling(8, 16, 8, 8), Tiling(2, 4, 8, 2))


def lists(height, width, radius, tiling):
    """For every owner tile: its first token, and (visited first token, unmasked) of its list."""
    found = visits(height, width, radius, tiling, CPU)
    for i, row_class in enumerate(found.row_class.tolist()):
        for j, column_class in enumerate(found.column_class.tolist()):
            begin, border, end = found.ranges[row_class, column_class].tolist()
            y, x = i * tiling.rows, j * tiling.columns
            steps = [
                (y + dy, x + dx, begin + n < border)
                for n, (dy, dx) in enumerate(found.offsets[begin:end].tolist())
            ]
            yield (y, x), steps


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    radius=st.integers(1, 50),
    tiling=st.sampled_from(TILINGS),
)
@example(height=1, width=1, radius=1, tiling=TILINGS[0])
@example(height=37, width=40, radius=8, tiling=TILINGS[0])
@example(height=40, width=33, radius=13, tiling=TILINGS[2])
def test_every_pair_is_visited_once_and_no_mask_is_left_out(height, width, radius, tiling):
    for (top, left), steps in lists(height, width, radius, tiling):
        visited = torch.zeros(height, width, dtype=torch.int)
        unmasked = torch.zeros(height, width, dtype=torch.bool)
        for y, x, inner in steps:
            assert y + tiling.step_rows > 0
            assert x >= 0  # disc_mask relies on it
            rows = slice(max(y, 0), y + tiling.step_rows)
            columns = slice(max(x, 0), x + tiling.step_columns)
            visited[rows, columns] += 1
            unmasked[rows, columns] |= inner
            if inner:
                assert min(y, x) >= 0
                assert y + tiling.step_rows <= height
                assert x + tiling.step_columns <= width
        assert visited.max() <= 1
        ys = torch.arange(height)[:, None]
        xs = torch.arange(width)[None, :]
        for y in range(top, min(top + tiling.rows, height)):
            for x in range(left, min(left + tiling.columns, width)):
                disc = (ys - y) ** 2 + (xs - x) ** 2 < radius**2
                assert visited[disc].all()
                assert disc[unmasked].all()


def test_lists_do_not_grow_with_the_image():
    small = visits(64, 64, 8, TILINGS[0], CPU)
    large = visits(512, 512, 8, TILINGS[0], CPU)
    assert large.offsets.shape == small.offsets.shape


@pytest.mark.parametrize(("radius", "most"), [(8, 1.60), (16, 1.60), (32, 1.40)])
def test_executed_over_exact_at_8192_px(radius, most):
    # Raster blocks of 128 x 128, as the reference code has them, execute 7.5 and 7.9 times.
    window = Window(512, 512, 512, radius)
    assert executed_keys(window, Tiling(8, 8, 8, 8)) / exact_keys(window) <= most


@pytest.mark.parametrize(
    ("width", "dtype"), [(20000, torch.int16), (32767, torch.int16), (40000, torch.int32)]
)
def test_offsets_have_16_bits_where_they_fit(width, dtype):
    wide = Tiling(1, 2048, 1, 2048)
    found = visits(1, width, 60000, wide, CPU)
    assert found.offsets.dtype == dtype
    # The first tile sees all tokens, the last tile of them farthest off.
    begin, _, end = found.ranges[0, found.column_class[0]].tolist()
    assert found.offsets[begin:end, 1].tolist() == list(range(0, width, 2048))
    assert found.ranges.dtype == found.row_class.dtype == torch.int32


def test_executed_keys_counts_what_the_lists_say():
    window, tiling = Window(21, 30, 70, 6), TILINGS[0]
    steps = sum(len(steps) for _, steps in lists(21, 30, 6, tiling))
    tiles = 3 * 4
    assert executed_keys(window, tiling) == (steps * 64 + tiles * 128) * 64 / (21 * 30)
    assert exact_keys(Window(1, 1, 3, 5)) == 4
