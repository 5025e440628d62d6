"""Windows in which only some rows are queries: what those rows get with all of them."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from support.agreement import FAR, inputs, problem
from support.compiled import switch_off
from support.slow import slow_but
from support.triton_mode import interpreted
from torch.utils.flop_counter import FlopCounterMode

from clear_dit.kernels import dense
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.flex import flex_attention
from clear_dit.kernels.merge import merge
from clear_dit.kernels.pooling import pooled_keys
from clear_dit.kernels.tiled import partial
from clear_dit.kernels.window import Window

GRIDS = {
    "several tiles": Window(26, 57, 7, 4),
    "no text": Window(19, 9, 0, 3),
    "pooled": Window(13, 18, 5, 6, 4),
    "past the diagonal": Window(11, 6, 3, 40),
}


def rows_of(window):
    """Ranges at the borders, inside, of one row, and of all."""
    last = window.height
    return (0, 5), (3, last - 2), (last - 1, last), (7, 8), (0, last)


def triton(query, key, value, window, scale, spatial_weight):
    from clear_dit.kernels.triton.ops import triton_attention

    return triton_attention(
        query, key, value, window, scale=scale, spatial_weight=spatial_weight, return_lse=True
    )


def flex(query, key, value, window, scale, spatial_weight):
    run = flex_attention(
        query, key, value, window, scale=scale, spatial_weight=spatial_weight, compiled=False
    )
    return run[0], None


def by_name(impl):
    def run(query, key, value, window, scale, spatial_weight):
        return local_attention(
            query, key, value, window,
            scale=scale, spatial_weight=spatial_weight, impl=impl, return_lse=True,
        )  # fmt: skip

    return run


RUNS = {"reference": by_name("reference"), "tiled": by_name("tiled"), "flex": flex}
if interpreted:
    RUNS["triton"] = triton


@pytest.mark.parametrize(
    ("impl", "grid"),
    slow_but(
        product(RUNS, GRIDS),
        *product(("tiled",), GRIDS),
        *((impl, "pooled") for impl in RUNS if impl != "flex"),
    ),
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rows_get_what_they_get_with_all(impl, grid):
    whole = GRIDS[grid]
    case = problem(
        whole, batch=1 if impl == "triton" else 2, heads=1 if impl == "triton" else 2, head_dim=16
    )
    dtype = torch.float16 if impl == "triton" else torch.float32
    query, key, value, weight, *_ = inputs(**case, dtype=dtype)
    out, lse = by_name("reference")(query, key, value, whole, 0.3, weight)
    for start, stop in rows_of(whole)[: 2 if impl == "triton" else None]:
        window = Window(
            whole.height, whole.width, whole.text_length, whole.radius, whole.down_factor,
            query_rows=(start, stop),
        )  # fmt: skip
        part = slice(*(whole.text_length + row * whole.width for row in (start, stop)))
        rtol, atol = (2e-2, 2e-3) if impl == "triton" else (1e-4, 1e-5)
        found, found_lse = RUNS[impl](query[:, part], key, value, window, 0.3, weight)
        torch.testing.assert_close(found, out[:, part], rtol=rtol, atol=atol)
        if found_lse is not None:
            torch.testing.assert_close(found_lse, lse[:, part], rtol=rtol, atol=atol)
        assert window.mask().sum() == window.attended_pairs()


def key_shares(window, cut):
    """Shares of the keys that are all of them: tokens, cells, and each cut in rows of its own."""
    whole = [(0, -(-window.height // 2**level)) for level in range(window.far_levels + 1)]
    none = [(0, 0)] * len(whole)
    if cut == "near and far":
        return [whole[0], *none[1:]], [none[0], *whole[1:]]
    middles = [(stop + level) // 2 for level, (_, stop) in enumerate(whole)]
    upper = [(0, min(middle, stop)) for middle, (_, stop) in zip(middles, whole, strict=True)]
    return upper, [(middle, stop) for (_, middle), (_, stop) in zip(upper, whole, strict=True)]


@pytest.mark.parametrize("window", [FAR, Window(13, 18, 5, 2, far_levels=6)])
@pytest.mark.parametrize("cut", ["near and far", "rows"])
@pytest.mark.parametrize("impl", ["reference", "tiled"])
def test_shares_of_the_keys_are_merged_to_all(monkeypatch, impl, cut, window):
    """Whoever sees none of a share has output 0 there, and no weight."""
    switch_off(monkeypatch)
    query, key, value, weight, offset, _ = inputs(**problem(window), dtype=torch.float32)
    learned = {"spatial_weight": weight, "far_offset": offset}
    expected = local_attention(query, key, value, window, impl="reference", **learned)
    pooled = pooled_keys(key, value, window, weight, query.shape[-1] ** -0.5)
    text, width = window.text_length, window.width
    for rows in ((0, window.height), (3, 12)):
        part = slice(text + rows[0] * width, text + rows[1] * width)
        merged = local_attention(
            query[:, part], key[:, :text], value[:, :text],
            replace(window, query_rows=rows, key_rows=((0, 0),) * (window.far_levels + 1)),
            pooled=tuple(x[:, :0] for x in pooled), impl=impl, return_lse=True, **learned,
        )  # fmt: skip
        for key_rows in key_shares(window, cut):
            share = replace(window, text_length=0, query_rows=rows, key_rows=tuple(key_rows))
            image = slice(*(text + row * width for row in key_rows[0]))
            places, first = [], 0
            for level, (start, stop) in enumerate(key_rows[1:], 1):
                columns = -(-width // 2**level)
                places.extend(range(first + start * columns, first + stop * columns))
                first += -(-window.height // 2**level) * columns
            own = tuple(x[:, places] for x in pooled)
            found = local_attention(
                query[:, part], key[:, image], value[:, image], share,
                pooled=own, impl=impl, return_lse=True, **learned,
            )  # fmt: skip
            unseen = ~share.mask().any(1)
            assert found[0][:, unseen].eq(0).all()
            assert (found[1][:, unseen] < -1e20).all()
            merged = merge(*merged, *found)
        torch.testing.assert_close(merged[0], expected[:, part], rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_the_rows():
    whole = Window(20, 9, 4, 3)
    query, key, value, *_ = inputs(**problem(whole, batch=1, heads=2, head_dim=16))
    total = 0
    for rows in ((0, 6), (6, 20)):
        window = Window(20, 9, 4, 3, query_rows=rows)
        part = slice(*(4 + row * 9 for row in rows))
        with FlopCounterMode(display=False) as counter:
            local_attention(query[:, part], key, value, window, impl="tiled")
        assert counter.get_total_flops() == window.attention_flops(2, 16)
        total += window.attended_pairs()
    assert total == whole.attended_pairs() - 4 * whole.sequence_length


@pytest.mark.parametrize("impl", ["tiled", *(["triton"] if interpreted else [])])
def test_dense_attention_of_few_queries_over_many_keys(impl, monkeypatch):
    monkeypatch.setattr(partial, "KEYS", 16)
    monkeypatch.setattr(partial, "QUERIES", 2)
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float16 if impl == "triton" else torch.float32
    query = torch.randn(2, 5, 2, 16, generator=generator).to(dtype)
    key, value = torch.randn(2, 2, 37, 2, 16, generator=generator).to(dtype)
    if impl == "triton":
        from clear_dit.kernels.triton.ops import triton_dense_attention

        out, lse = triton_dense_attention(query, key, value, 0.3)
    else:
        out, lse = dense.dense_attention(query, key, value, scale=0.3, impl=impl)
    scores = torch.einsum("bqhd,bkhd->bqhk", query.float(), key.float()) * 0.3
    expected = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(dim=-1), value.float())
    tolerance = 2e-3 if impl == "triton" else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1), rtol=tolerance, atol=tolerance)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"query_rows must be \(start, stop\).*got \(3, 3\)"):
        Window(4, 4, 0, 2, query_rows=(3, 3))
    window = Window(4, 4, 2, 2, query_rows=(1, 3))
    query, key = torch.randn(1, 8, 2, 16), torch.randn(1, 18, 2, 16)
    with pytest.raises(ValueError, match=r"= 18, of which the rows \(1, 3\) are queries"):
        local_attention(query[:, 1:], key, key, window)
    with pytest.raises(ValueError, match=r"key must be .* \(1, 18, 2, 16\), got"):
        local_attention(query, query, query, window)
    with pytest.raises(ValueError, match="no backward pass"):
        local_attention(query.requires_grad_(), key, key, window)
