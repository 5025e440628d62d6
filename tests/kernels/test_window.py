import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.oracle import mask_by_definition
from support.slow import slow_but

from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window

windows = st.builds(
    lambda height, width, text_length, radius, down_factor: Window(
        height, width, text_length, radius, min(down_factor, height, width)
    ),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    text_length=st.integers(0, 5),
    radius=st.integers(1, 20),
    down_factor=st.integers(1, 5),
)


@given(windows)
def test_mask_is_the_definition(window):
    total = window.sequence_length
    mask = window.mask()
    assert torch.equal(mask[:, :total], mask_by_definition(window))
    assert mask.shape == (total, total + window.pooled_length)
    assert not mask[: window.text_length, total:].any()
    assert mask[window.text_length :, total:].all()


@given(windows)
def test_attended_pairs_is_the_sum_of_the_mask(window):
    assert window.attended_pairs() == int(window.mask().sum())


@pytest.mark.parametrize(
    ("pixels", "gflop"),
    [
        (1024, (260.9, 63.5, 86.6, 154.1)),
        (2048, (3507.9, 246.2, 352.6, 724.3)),
        (4096, (53604.4, 979.3, 1433.2, 3141.7)),
        (8192, (847726.7, 3915.4, 5789.2, 13085.0)),
    ],
)
def test_flops_are_the_papers_table(pixels, gflop):
    side = pixels // 16
    past_the_diagonal = 2 * side
    for radius, expected in zip((past_the_diagonal, 8, 16, 32), gflop, strict=True):
        flops = Window(side, side, 512, radius).attention_flops(heads=24, head_dim=128)
        assert round(flops / 1e9, 1) == expected


def test_interior_token_sees_the_disc():
    for radius, keys in ((8, 193), (16, 793), (32, 3205)):
        side = 2 * radius + 1
        window = Window(side, side, 0, radius)
        centre = (side // 2) * side + side // 2
        assert int(mask_by_definition(window)[centre].sum()) == keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, 0, 0), "radius must be at least 1 token(s), got 0"),
        ((4, 4, 0, -3), "radius must be at least 1 token(s), got -3"),
        ((0, 4, 0, 1), "height must be at least 1"),
        ((4, 4, -1, 1), "text_length must be at least 0"),
        ((4, 6, 0, 1, 5), "down_factor must not exceed the token grid (4 x 6), got 5"),
        ((4, 4, 0, 1, 0), "down_factor must be at least 1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Window(*arguments)


@pytest.mark.parametrize("radius", [2.5, True, "8", None])
def test_fields_are_integers(radius):
    with pytest.raises(TypeError, match="radius must be an int"):
        Window(4, 4, 0, radius)


@pytest.mark.parametrize("impl", slow_but(["tiled", "flex"], "tiled"))
def test_a_huge_radius_sees_all_in_every_implementation(impl):
    window = Window(3, 5, 1, 10**12)
    assert window.mask().all()
    assert window.attended_pairs() == 16**2
    tensors = torch.randn(3, 1, 16, 1, 8)
    out = local_attention(*tensors, window, impl=impl)
    torch.testing.assert_close(out, local_attention(*tensors, window, impl="reference"))
    assert pickle.loads(pickle.dumps(window)) == window


def test_window_is_a_value():
    assert Window(4, 4, 1, 2) == Window(4, 4, 1, 2)
    assert len({Window(4, 4, 1, 2), Window(4, 4, 1, 2), Window(4, 4, 1, 3)}) == 2
    with pytest.raises(AttributeError):
        Window(4, 4, 1, 2).radius = 3
