"""Attention whose far pairs have a query and key of their own."""

from dataclasses import replace

import pytest
import torch
from support.oracle import relative_error
from support.oracle import two_positions_by_definition as definition
from support.slow import slow_but

from clear_dit.kernels import two_positions
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.two_positions import (
    Scaled,
    full_two_position_attention,
    two_position_attention,
)
from clear_dit.kernels.window import Window

WINDOWS = [
    Window(9, 13, 7, 3),
    Window(9, 13, 7, 3, down_factor=4),
    Window(6, 5, 0, 2),
    Window(6, 5, 0, 2, down_factor=2),
    Window(5, 6, 4, 1),
    Window(5, 6, 1, 100),
    Window(17, 13, 7, 2, far_levels=4),
    Window(9, 14, 0, 3, far_levels=2),
    Window(6, 5, 2, 20, far_levels=10),
    Window(66, 5, 3, 2, far_levels=5),
    Window(33, 3, 0, 2, far_levels=1),
]
IDS = [
    str((w.height, w.width, w.text_length, w.radius, w.down_factor, w.far_levels)) for w in WINDOWS
]


def inputs(window, dtype, between=0, batch=2, heads=2, head_dim=16):
    """Query and key by every position, value, and what is learned."""
    generator = torch.Generator().manual_seed(0)
    shape = (5 + 2 * between, batch, window.sequence_length, heads, head_dim)
    value, *tensors = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    rotated = list(zip(tensors[::2], tensors[1::2], strict=True))
    learned = {}
    if window.down_factor > 1:
        f = window.down_factor
        learned["spatial_weight"] = torch.rand(1, 1, 1, f, 1, f, 1, generator=generator)
    if window.far_levels:
        learned["spatial_weight"] = torch.rand(window.far_levels, 2, 2, generator=generator)
        learned["far_offset"] = torch.randn(window.far_levels, heads, generator=generator)
    return rotated, value, learned


def attend(rotated, value, window, **options):
    near, *between, far = rotated
    scaled = Scaled(lambda: far, [lambda each=each: each for each in between])
    return two_position_attention(near, scaled, value, window, **options)


@pytest.mark.parametrize("window", WINDOWS, ids=IDS)
@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("between", [0, 1, 3])
@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.bfloat16], torch.float32))
def test_each_pair_is_scored_by_its_own_positions(window, impl, between, dtype):
    rotated, value, learned = inputs(window, dtype, between)
    out = attend(rotated, value, window, scale=0.3, impl=impl, **learned)
    assert out.dtype == dtype
    exact = definition(rotated, value, window, learned, 0.3)
    assert relative_error(out, exact) < (2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("window", WINDOWS, ids=IDS)
@pytest.mark.parametrize("block", [1, 1000, 2**25])
def test_full_attention_scores_far_pairs_by_scaled_positions(monkeypatch, window, block):
    monkeypatch.setattr(two_positions, "SCORES", block)
    window = replace(window, down_factor=1, far_levels=0)
    rotated, value, _ = inputs(window, torch.float32)
    out = full_two_position_attention(*rotated, value, window, scale=0.3)
    exact = definition(rotated, value, window, None, 0.3, full=True)
    assert relative_error(out, exact) < 2e-6


@pytest.mark.parametrize("window", WINDOWS, ids=IDS)
@pytest.mark.parametrize("between", [0, 1])
def test_queries_may_be_the_images_alone(window, between):
    rotated, value, learned = inputs(window, torch.float32, between)
    text, own = window.text_length, window.image_queries
    alone = [(query[:, text:], key) for query, key in rotated]

    def assert_same(found, whole):
        torch.testing.assert_close(found, whole[:, text:], rtol=1e-5, atol=1e-6)

    assert_same(attend(alone, value, own, **learned), attend(rotated, value, window, **learned))
    assert_same(
        full_two_position_attention(alone[0], alone[-1], value, own),
        full_two_position_attention(rotated[0], rotated[-1], value, window),
    )


@pytest.mark.parametrize("window", WINDOWS, ids=IDS)
def test_equal_positions_are_local_attention(window):
    (near, _), value, learned = inputs(window, torch.float64)
    expected = local_attention(*near, value, window, **learned)
    for positions in (2, 4):
        torch.testing.assert_close(attend([near] * positions, value, window, **learned), expected)


@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[1], WINDOWS[9]])
def test_positions_between_are_made_only_where_levels_have_them(window):
    """They take as much memory as the layer's tokens."""
    (near, far), value, learned = inputs(window, torch.float32)
    made = []

    def rotate():
        made.append(1)
        return far

    two_position_attention(near, Scaled(lambda: far, [rotate]), value, window, **learned)
    levels = window.levels_by_position(1)[1] if window.far_levels else ()
    assert len(made) == (1 if levels else 0)
    assert bool(levels) == (window is WINDOWS[9])


def test_the_images_own_window_is_made_once(monkeypatch):
    """What FlexAttention remembers on it then serves every layer and step."""
    seen = []

    def spy(query, key, value, window, **options):
        seen.append(window)
        return local_attention(query, key, value, window, **options)

    monkeypatch.setattr(two_positions, "local_attention", spy)
    window = WINDOWS[1]
    rotated, value, learned = inputs(window, torch.float32)
    for _ in range(2):
        attend(rotated, value, window, **learned)
    assert seen == [Window(9, 13, 0, 3)] * 2
    assert seen[0] is seen[1]


def test_pooled_keys_that_count_are_refused():
    window = Window(8, 8, 2, 2, down_factor=2, pooled_weight="count")
    rotated, value, _ = inputs(window, torch.float32)
    with pytest.raises(ValueError, match='pooled_weight="count" does not go with two positions'):
        attend(rotated, value, window)


def test_gradients_are_refused():
    rotated, value, _ = inputs(WINDOWS[0], torch.float32)
    value.requires_grad_()
    with pytest.raises(ValueError, match="has no gradients; train at the native size"):
        attend(rotated, value, WINDOWS[0])
    with torch.no_grad():
        attend(rotated, value, WINDOWS[0])
    for window in (WINDOWS[0], WINDOWS[6]):
        (near, _), value, learned = inputs(window, torch.float32)
        far = tuple(x.clone().requires_grad_() for x in near)
        with pytest.raises(ValueError, match="has no gradients; train at the native size"):
            attend([near, far], value, window, **learned)
