"""Triton's far keys in its interpreter, against the definition; parts of the keys, merged."""

from dataclasses import replace

import pytest
import torch
from support.agreement import HALVES, check, inputs, problem
from support.slow import slow, slow_but
from support.triton_mode import interpreted

from clear_dit.kernels.cells import cell_count
from clear_dit.kernels.merge import merge
from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.pooling import pooled_bias, pooled_keys
from clear_dit.kernels.reference import reference_attention
from clear_dit.kernels.window import Window

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

from clear_dit.kernels.triton import launch, ops, tables
from clear_dit.kernels.triton.geometry import Tiling

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {
    "partial cells at both borders": Window(13, 19, 5, 2, far_levels=4),
    "no text": Window(11, 17, 0, 3, far_levels=3),
    "past the diagonal": Window(6, 9, 3, 40, far_levels=2),
    "one level, which all that is far is in": Window(9, 18, 64, 3, far_levels=1),
    "more levels than the grid has": Window(5, 3, 1, 2, far_levels=7),
    "one token": Window(1, 1, 0, 2, far_levels=1),
    "counts of pooled keys": Window(9, 13, 3, 3, 4, pooled_weight="count"),
}


def run(window):
    def attention(query, key, value, weight, offset=None):
        return ops.triton_attention(
            query, key, value, window,
            scale=query.shape[-1] ** -0.5, spatial_weight=weight, far_offset=offset,
        )[0]  # fmt: skip

    return attention


@pytest.fixture
def hopper_tiles(monkeypatch):
    """float32's own tiles are so small that the interpreter takes minutes."""
    monkeypatch.setattr(ops, "table_key", lambda *kind: ("sm_90", 128, 2))


@pytest.mark.usefixtures("hopper_tiles")
@pytest.mark.parametrize("name", slow_but(CASES, "more levels than the grid has", "one token"))
def test_float32_is_the_definition(name):
    case = problem(CASES[name], batch=1, heads=1, head_dim=24)
    check(run(CASES[name]), case, torch.float32)


@slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, HALVES[place % 2]) for place, name in enumerate(CASES)],
    ids=str,
)
def test_half_precision_is_the_definition(name, dtype):
    """Of means and counts alone: all heads then read one bias."""
    case = problem(CASES[name], batch=1, heads=2, head_dim=16, weighted=False)
    check(run(CASES[name]), case, dtype)


@slow
@pytest.mark.parametrize("text", [0, 5])
def test_grouped_heads_are_the_definition(text):
    """With an offset for every query head."""
    window = Window(5, 9, text, 2, far_levels=2)
    check(run(window), problem(window, batch=1, heads=2, head_dim=16, group=2), torch.float16)


def parts_of(window, cuts):
    """Windows of the keys above and below a row of tokens and of every level's cells."""
    ends = [cell_count(window.height, level) for level in range(window.far_levels + 1)]
    for rows in ([(0, cut) for cut in cuts], list(zip(cuts, ends, strict=True))):
        yield replace(window, key_rows=tuple(rows))


def given(tensor, window, level, start=0):
    """Of a level's keys, which begin at `start`, those of the window."""
    columns = cell_count(window.width, level)
    first, last = window.given_rows(level)
    return tensor[:, start + first * columns : start + last * columns]


@pytest.mark.usefixtures("hopper_tiles")
@pytest.mark.parametrize(
    ("window", "cuts"),
    [
        (Window(13, 11, 0, 3, query_rows=(3, 8), far_levels=3), (7, 3, 2, 0)),
        (Window(13, 11, 0, 2, query_rows=(1, 4), far_levels=3), (13, 7, 4, 2)),  # nothing is left
    ],
)
def test_parts_of_the_keys_merge_to_the_whole(window, cuts):
    whole = replace(window, query_rows=None)
    query, key, value, weight, offset, _ = inputs(**problem(whole, batch=1), dtype=torch.float32)
    rows = slice(*(window.width * row for row in window.query_rows))
    pooled = pooled_keys(key, value, whole, weight, 0.3)
    exact, exact_lse = reference_attention(
        query.double(), key.double(), value.double(), whole,
        scale=0.3, far_offset=offset, pooled=pooled,
    )  # fmt: skip
    results = []
    for part in parts_of(window, cuts):
        starts = [0]
        for level in range(1, window.far_levels + 1):
            starts.append(starts[-1] + whole.cells_of_level(level))
        cells = [
            torch.cat([x[:, :0], *(
                given(x, part, level, starts[level - 1])
                for level in range(1, window.far_levels + 1)
            )], dim=1)
            for x in pooled
        ]  # fmt: skip
        tokens = [given(x, part, 0) for x in (key, value)]
        results.append(
            ops.triton_attention(
                query[:, rows], *tokens, part, scale=0.3, far_offset=offset, pooled=tuple(cells)
            )
        )
        plain, plain_lse = reference_attention(
            query[:, rows], *tokens, part, scale=0.3, far_offset=offset, pooled=tuple(cells)
        )
        torch.testing.assert_close(results[-1][0], plain, rtol=1e-4, atol=1e-5)
        nothing = plain_lse == float("-inf")
        assert (results[-1][1][nothing] < -1e30).all()
    out, lse = merge(*results[0], *results[1])
    torch.testing.assert_close(out.double(), exact[:, rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse[:, rows].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    slow_but(
        [
            tables.ForwardConfig(Tiling(8, 16, 8, 8), 32, 4, 1),
            tables.ForwardConfig(Tiling(4, 4, 4, 4), 16, 4, 1),
            tables.ForwardConfig(Tiling(2, 16, 4, 4), 64, 4, 1),
        ],
    ),
    ids=lambda config: config.name,
)
def test_every_tile_shape_and_others_rows_are_left_alone(config):
    window = Window(9, 17, 3, 2, far_levels=3)
    query, key, value, weight, offset, _ = inputs(
        **problem(window, batch=2, heads=1), dtype=torch.float32
    )
    pooled = pooled_keys(key, value, window, weight, 0.2)
    out = torch.full_like(query, float("nan"))
    lse = torch.full(query.shape[:3], float("nan"))
    geometry = Geometry.of(window, 0.2)
    bias = pooled_bias(window, 1, offset, query.device)
    launch.far_attention(query, key, value, *pooled, bias, out, lse, geometry, config)
    exact, exact_lse = reference_attention(
        query.double(), key.double(), value.double(), window,
        scale=0.2, far_offset=offset, pooled=pooled,
    )  # fmt: skip
    torch.testing.assert_close(out[:, 3:].double(), exact[:, 3:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:, 3:].double(), exact_lse[:, 3:], rtol=1e-5, atol=1e-5)
    assert out[:, :3].isnan().all()
