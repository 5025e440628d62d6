"""Far keys pooled by Triton, in its interpreter: against PyTorch's operators in float64."""

import pytest
import torch
from support.agreement import HALVES
from support.oracle import relative_error
from support.pooling import exact, problem
from support.slow import slow_but
from support.triton_mode import interpreted

from clear_dit.kernels import choice
from clear_dit.kernels.pooling import pool_cells_by_operators

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

from clear_dit.kernels.triton.pooling import pool_cells

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# (height, width, levels)
GRIDS = {
    "one token": (1, 1, 1),
    "a row": (1, 19, 3),
    "a column, a level of another launch": (19, 1, 4),
    "odd": (5, 7, 2),
    "one beyond a tile": (9, 17, 5),
    "many tiles of two launches": (33, 17, 6),
    "more levels than the grid needs": (3, 6, 10),
}


def check(arguments, scale=0.3, roundings=2):
    """Keys and values, relative to float64's."""
    dtype = arguments[0].dtype
    found = pool_cells(*arguments, scale)
    for ours, truth in zip(found, exact(arguments, scale), strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert relative_error(ours, truth) <= roundings * torch.finfo(dtype).eps


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "grid",
    slow_but(GRIDS, "one token", "a row", "odd", "more levels than the grid needs"),
)
def test_cells_are_those_of_the_operators(grid, weighted):
    check(problem(*GRIDS[grid], weighted), roundings=8)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [16, 64])
def test_half_precision_is_rounded_once(dim, dtype):
    check(problem(5, 9, 4, dtype=dtype, dim=dim), roundings=0.28)


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_no_size_of_the_keys_overflows(scale):
    """What rounds off the exponents is a relative error of the shares."""
    arguments = problem(9, 9, 4)
    largest = abs(scale) * float(arguments[0].square().sum(-1).max())
    check(arguments, scale, roundings=2 * largest)


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def part_of_a_projection(x):
    return torch.stack([x, x + 1], dim=2)[:, :, 0]


def channels_apart(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize(
    "layout",
    slow_but([heads_first, part_of_a_projection, channels_apart], part_of_a_projection),
)
def test_any_strides_give_the_same_bits(layout):
    key, value, *others = problem(3, 5, 4, batch=2, heads=3)
    expected = pool_cells(key, value, *others, 0.3)
    assert not layout(key).is_contiguous()
    for strided in ((layout(key), value), (key, layout(value))):
        for one, other in zip(pool_cells(*strided, *others, 0.3), expected, strict=True):
            assert torch.equal(one, other)
    check([key, value, *others], roundings=8)


def test_a_gpu_pools_by_triton_where_it_can(monkeypatch):
    """Here it cannot, until the one that refuses says nothing."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("clear_dit::pool_cells", "CUDA")
    arguments = problem(3, 5, 2)
    by_operators = pool_cells_by_operators(*arguments, 0.3)
    pooled = choice.pool_cells_on_gpu(*arguments, 0.3)
    assert all(map(torch.equal, pooled, by_operators))
    monkeypatch.setattr(choice, "why_not_triton", lambda *asked, **more: None)
    pooled, by_triton = choice.pool_cells_on_gpu(*arguments, 0.3), pool_cells(*arguments, 0.3)
    assert all(map(torch.equal, pooled, by_triton))
