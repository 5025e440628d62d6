"""Windows with reference images that are local within themselves, against the definition."""

import pickle
import re
from dataclasses import fields, replace

import pytest
import torch
from support.oracle import mask_by_definition, pool_by_definition, relative_error, repeated
from support.triton_mode import interpreted
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from clear_dit.kernels import choice
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.tiled import partial
from clear_dit.kernels.two_positions import Scaled, two_position_attention
from clear_dit.kernels.window import Window

# Reference images behind 3 tokens of text, or behind none.
WINDOWS = {
    "one": Window(5, 4, 3 + 42, 2, local_references=((6, 7),)),
    "two": Window(9, 6, 3 + 6 + 40, 3, local_references=((2, 3), (8, 5))),
    "pooled": Window(6, 7, 3 + 20 + 6, 2, 3, local_references=((4, 5), (1, 6))),
    "no text": Window(4, 4, 30, 2, local_references=((5, 6),)),
    "smaller than the radius": Window(11, 12, 3 + 12, 5, local_references=((3, 4),)),
}
windows = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)


def inputs(window, dtype=torch.float32, batch=2, heads=2, head_dim=16, group=1):
    generator = torch.Generator().manual_seed(0)
    shape = 3, batch, window.sequence_length, heads * group, head_dim
    query, *keys = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return query, *(x[:, :, :heads] for x in keys)


def definition(query, key, value, window, scale):
    """(out, lse) in float64: one row of keys after the other, and pooled keys for the image."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (repeated(x, query.shape[2] // x.shape[2]) for x in (key, value))
    mask = mask_by_definition(window)
    before = window.text_length - sum(h * w for h, w in window.local_references)
    for rows, columns in window.local_references:
        places = [(y, x) for y in range(rows) for x in range(columns)]
        for i, (y, x) in enumerate(places):
            for j, (other_y, other_x) in enumerate(places):
                inside = (y - other_y) ** 2 + (x - other_x) ** 2 < window.radius**2
                mask[before + i, before + j] = inside
        before += rows * columns
    if window.down_factor > 1:
        square = torch.full((window.down_factor,) * 2, window.down_factor**-2.0).double()
        pooled = [pool_by_definition(x, window, square) for x in (key, value)]
        key, value = torch.cat([key, pooled[0]], dim=1), torch.cat([value, pooled[1]], dim=1)
        sees_pooled = torch.arange(len(mask)) >= window.text_length
        mask = torch.cat([mask, sees_pooled[:, None].expand(-1, pooled[0].shape[1])], dim=1)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)
    return out, scores.logsumexp(dim=-1).transpose(1, 2)


@windows
@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize(
    ("dtype", "group"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 3)]
)
def test_references_see_all_but_of_themselves_their_disc(window, impl, dtype, group, monkeypatch):
    monkeypatch.setattr(partial, "KEYS", 16)
    monkeypatch.setattr(partial, "QUERIES", 7)
    tensors = inputs(window, dtype, group=group)
    found = local_attention(*tensors, window, scale=0.3, impl=impl, return_lse=True)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    for value, exact in zip(found, definition(*tensors, window, 0.3), strict=True):
        assert relative_error(value, exact) < (2e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(local_attention(*tensors, window, scale=0.3, impl=impl), found[0])


def test_any_strides():
    window = WINDOWS["two"]
    tensors = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs(window)]
    found = local_attention(*tensors, window, scale=0.3, impl="tiled")
    assert relative_error(found, definition(*tensors, window, 0.3)[0]) < 2e-6


@pytest.mark.skipif(not interpreted, reason="needs Triton and its interpreter")
@pytest.mark.parametrize("name", ["two", "pooled"])
def test_by_triton(name, monkeypatch):
    monkeypatch.setitem(choice._WHY_NOT, "triton", choice.runs_everywhere)
    window = WINDOWS[name]
    tensors = inputs(window, torch.float16, batch=1, heads=1)
    found = local_attention(*tensors, window, scale=0.3, impl="triton", return_lse=True)
    for value, exact in zip(found, definition(*tensors, window, 0.3), strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=2e-2, atol=2e-3)


@windows
def test_past_the_diagonals_it_is_full_attention(window):
    window = replace(window, radius=100, down_factor=1)
    tensors = inputs(window)
    full = scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)
    torch.testing.assert_close(local_attention(*tensors, window), full)


@windows
def test_pairs_and_flops(window):
    assert window.attended_pairs() == int(window.mask().sum())
    window = replace(window, down_factor=1)
    with FlopCounterMode(display=False) as counter:
        local_attention(*inputs(window), window, impl="tiled")
    assert counter.get_total_flops() == 2 * window.attention_flops(2, 16)


def test_what_an_image_costs_within_itself_is_linear():
    small, large = (
        Window(8, 8, side**2, 4, local_references=((side, side),)) for side in (64, 128)
    )
    by_size = [
        window.attended_pairs() - 2 * 64 * window.text_length - 64**2 for window in (small, large)
    ]
    assert 4 < by_size[1] / by_size[0] < 4.2


def test_derived_windows_are_made_once_and_stay_behind():
    window = WINDOWS["pooled"]
    derived = window.image_only, window.image_queries, *window.reference_windows
    assert derived == (
        Window(6, 7, 0, 2),
        Window(6, 7, 29, 2, 3, query_rows=(0, 6)),
        Window(4, 5, 0, 2),
        Window(1, 6, 0, 2),
    )
    again = window.image_only, window.image_queries, *window.reference_windows
    assert all(one is other for one, other in zip(derived, again, strict=True))
    copy = pickle.loads(pickle.dumps(window))
    assert copy == window
    assert hash(copy) == hash(window)
    assert vars(copy).keys() == {field.name for field in fields(window)} < vars(window).keys()
    assert copy.image_only is not window.image_only


@pytest.mark.parametrize(
    ("references", "rows", "message"),
    [
        (((2, 3), (0, 4)), None, "rows of local_references must be at least 1 token(s), got 0"),
        (((4, 5),), None, "local_references ((4, 5),) must be among the 12 tokens of text_length"),
        (((2, 3),), (0, 4), "local_references and query_rows exclude each other"),
    ],
)
def test_refused_windows(references, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Window(4, 4, 12, 2, query_rows=rows, local_references=references)


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"columns of local_references must be an int, got 2\.5"):
        Window(4, 4, 12, 2, local_references=((2, 2.5),))
    for references in ([(2, 2)], (2, 2), ([2, 2],), ((2, 2, 1),), None):
        with pytest.raises(TypeError, match=r"must be a tuple of \(rows, columns\), got"):
            Window(4, 4, 12, 2, local_references=references)
    window = WINDOWS["one"]
    query, key, value = inputs(window)
    near = query, key
    with pytest.raises(ValueError, match=r"do not go with two positions .* references='dense'"):
        two_position_attention(near, Scaled(lambda: near), value, window)
    value.requires_grad_()
    for impl in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"no backward pass; .* or references='dense'"):
            local_attention(query, key, value, window, impl=impl)
    with torch.no_grad(), pytest.raises(ValueError, match="impl='flex' cannot run here: it cannot"):
        local_attention(query, key, value, window, impl="flex")
