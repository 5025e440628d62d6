"""Windows in which only some rows are queries: what those rows get with all of them."""

import pytest
import torch
from support.agreement import inputs, problem
from support.triton_mode import interpreted
from torch.utils.flop_counter import FlopCounterMode

from clear_dit.kernels import dense
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.flex import flex_attention
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


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("impl", RUNS)
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
    with pytest.raises(ValueError, match="key must have query's shape"):
        local_attention(query, query, query, window)
    with pytest.raises(ValueError, match="no backward pass"):
        local_attention(query.requires_grad_(), key, key, window)
