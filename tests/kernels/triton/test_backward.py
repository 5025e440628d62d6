"""Triton's gradients in its interpreter, each against the definition in float64.

The yardstick is autograd through the dense definition in the same dtype: at most twice its error,
plus two roundings (support/agreement.py).
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from support.agreement import HALVES
from support.oracle import mask_by_definition, relative_error
from support.slow import slow, slow_but
from support.triton_mode import interpreted

from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.window import Window

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

from clear_dit.kernels.triton.backward import MOST_SPLITS, attention_backward, split_walk
from clear_dit.kernels.triton.geometry import Tiling, visits
from clear_dit.kernels.triton.tables import BackwardConfig, RunConfig, TileConfig

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAMES = ("query", "key", "value", "pooled_key", "pooled_value")
SQUARE = TileConfig(Tiling(8, 8, 8, 8), 4, 1)
CONFIG = BackwardConfig(
    SQUARE, SQUARE, SQUARE, SQUARE, RunConfig(32, 64, 4, 1), RunConfig(32, 64, 4, 1)
)


def definition(query, key, value, pooled_key, pooled_value, window, scale):
    """Output and log-sum-exp of dense attention; the pooled keys are leaves of their own."""
    mask = mask_by_definition(window)
    pooled_mask = torch.ones(len(mask), pooled_key.shape[1], dtype=torch.bool)
    pooled_mask[: window.text_length] = False
    mask = torch.cat([mask, pooled_mask], dim=1)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, torch.cat([key, pooled_key], 1)) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), torch.cat([value, pooled_value], 1))
    return out, scores.logsumexp(-1).transpose(1, 2)


def gradients(tensors, grad, window, scale):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = definition(*leaves, window, scale)
    return out.detach(), lse.detach(), torch.autograd.grad(out, leaves, grad)


def tensors_of(window, batch=1, heads=1, head_dim=16, pooled=0, dtype=torch.float32, seed=0):
    """Query, key, value, grad, pooled_key, pooled_value."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (window.sequence_length,) * 4 + (pooled,) * 2
    return [
        torch.randn(batch, length, heads, head_dim, generator=generator).to(dtype)
        for length in lengths
    ]


def ours(tensors, grad, out, lse, window, scale, config=CONFIG, programs=8):
    return attention_backward(
        grad, *tensors, torch.empty(0, grad.shape[2]), out.to(grad.dtype), lse.float().contiguous(),
        Geometry.of(window, scale), config=config, programs=programs,
    )[:5]  # fmt: skip


def check(
    window, config=CONFIG, programs=8, dtype=torch.float32, scale=0.25, change=lambda *x: x, **shape
):
    query, key, value, grad, *pooled = tensors_of(window, dtype=dtype, **shape)
    query, key, value, grad = change(query, key, value, grad)
    tensors = (query, key, value, *pooled)
    out, lse, truth = gradients([x.double() for x in tensors], grad.double(), window, scale)
    _, _, plain = gradients(tensors, grad, window, scale)
    found = ours(tensors, grad, out, lse, window, scale, config, programs)
    for name, tensor, value_, yardstick, exact in zip(
        NAMES, tensors, found, plain, truth, strict=True
    ):
        assert value_.shape == tensor.shape
        assert value_.dtype == dtype
        assert value_.is_contiguous()
        # A gradient that is zero in truth (radius 1 without text) has rounding noise only.
        if exact.norm() < 1e-9:
            assert value_.double().norm() < 1e-2, name
            continue
        error = relative_error(value_, exact)
        bound = 2 * relative_error(yardstick, exact) + 2 * torch.finfo(dtype).eps
        assert error <= bound, f"{name}: {error:.1e} > {bound:.1e}"


INNER = Window(16, 17, 3, 14)


def test_inner_has_tiles_that_need_no_mask():
    lists = visits(INNER.height, INNER.width, INNER.radius, SQUARE.tiling, torch.device("cpu"))
    begin, border, end = lists.ranges.unbind(-1)
    assert (border > begin).any()
    assert (end > border).any()


CASES = {
    "partial tiles": (Window(13, 18, 7, 4), {"pooled": 5}),
    "whole tiles and blocks": (Window(8, 16, 64, 3), {"pooled": 64}),
    "no text": (Window(9, 17, 0, 5), {"pooled": 3}),
    "itself and one text token": (Window(10, 9, 1, 1), {}),
    "itself alone": (Window(5, 9, 0, 1), {"heads": 2}),
    "past the diagonal": (Window(12, 17, 33, 40), {}),
    "less than a tile": (Window(3, 5, 70, 3), {"pooled": 70}),
    "one token": (Window(1, 1, 0, 1), {}),
    "inner tiles": (INNER, {}),
    "odd head_dim": (Window(9, 10, 7, 4), {"heads": 2, "head_dim": 24, "pooled": 4}),
    "wide heads": (Window(9, 10, 7, 4), {"head_dim": 64, "pooled": 2}),
    "batch of three": (Window(7, 10, 2, 4), {"batch": 3, "pooled": 6}),
}


@pytest.mark.parametrize(
    "name",
    slow_but(
        CASES, "whole tiles and blocks", "itself and one text token",
        "itself alone", "less than a tile", "one token",
    ),
)  # fmt: skip
def test_gradients_are_those_of_the_definition(name):
    window, shape = CASES[name]
    check(window, **shape)


@slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    list(product(CASES, HALVES)),
    ids=str,
)
def test_gradients_in_half_precision_are_those_of_the_definition(name, dtype):
    window, shape = CASES[name]
    check(window, dtype=dtype, **shape)


@slow
def test_strides():
    def change(query, key, value, grad):
        packed = torch.stack([query, key, value], dim=2)
        heads_first = grad.transpose(1, 2).contiguous().transpose(1, 2)
        batch_inside = packed.transpose(0, 1).contiguous().transpose(0, 1)
        return (*batch_inside.unbind(2), heads_first)

    check(Window(9, 11, 5, 4), batch=2, heads=2, pooled=3, change=change)


def tiles(*tiling, descriptor=False):
    return TileConfig(Tiling(*tiling), 4, 1, descriptor)


@pytest.mark.parametrize(
    ("query", "key"),
    [
        (tiles(8, 8, 8, 8, descriptor=True), tiles(8, 16, 8, 8, descriptor=True)),
        (tiles(8, 16, 8, 8), tiles(8, 8, 4, 8)),
        pytest.param(tiles(4, 8, 4, 8), tiles(4, 4, 4, 4), marks=slow),
        pytest.param(tiles(4, 4, 8, 4, descriptor=True), tiles(16, 4, 2, 16), marks=slow),
    ],
)
def test_every_tile_shape_and_way_to_load(query, key):
    config = replace(
        CONFIG, query=query, key=key,
        text_query=RunConfig(16, 32, 4, 1), common_key=RunConfig(64, 16, 4, 1),
    )  # fmt: skip
    check(Window(9, 13, 5, 5), config, pooled=3)


def test_strides_that_no_descriptor_takes():
    """Tokens of 18 numbers start at no multiple of 16 bytes: pointers do it."""
    tile = tiles(8, 8, 8, 8, descriptor=True)
    config = replace(CONFIG, query=tile, key=tile)
    check(Window(5, 9, 2, 3), config, head_dim=18)


@slow
@pytest.mark.parametrize("programs", [1, 5, 1000])
def test_any_number_of_splits(programs):
    check(Window(4, 40, 40, 3), programs=programs, pooled=35)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 4096, 262656])
@pytest.mark.parametrize("owners", [1, 24, 96, 5000])
def test_splits_cover_the_walk_and_none_is_empty(length, owners):
    splits, size = split_walk(length, 64, owners, 1056)
    assert 1 <= splits <= MOST_SPLITS
    assert size % 64 == 0
    assert (splits - 1) * size < length <= splits * size


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of rows that are not stored
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        # exp(-lse) is infinite, and must not meet the zeros beyond the border or the last key.
        (torch.float32, (30, -30, 1)),
        (torch.float16, (60, 60, 100)),
        (torch.bfloat16, (60, 60, 100)),
    ],
)
def test_extreme_scores_and_gradients_stay_finite(dtype, factors):
    window = Window(9, 10, 7, 4)
    tensors = tensors_of(window, pooled=2, dtype=dtype)
    query, key, value, grad, *pooled = tensors
    if factors[1] < 0:
        query, key, pooled[0] = query.abs(), key.abs(), pooled[0].abs()
    query, key, grad = (x * y for x, y in zip((query, key, grad), factors, strict=True))
    wanted = (query, key, value, pooled[0] * factors[1], pooled[1])
    out, lse, truth = gradients([x.double() for x in wanted], grad.double(), window, 0.25)
    assert factors[1] > 0 or lse.max() < -100
    for found, exact in zip(ours(wanted, grad, out, lse, window, 0.25), truth, strict=True):
        assert found.isfinite().all()
        # In halves delta carries the rounding of `out`, which the truth here is smaller than.
        assert dtype in HALVES or relative_error(found, exact) < 0.01
