"""The image alone, without any text: every implementation, forward and backward."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from support.agreement import check, inputs, problem
from support.compiled import switch_off
from support.operators import check_operator
from support.oracle import attention_by_definition, relative_error
from support.slow import slow, slow_but
from support.triton_mode import interpreted
from torch.utils.flop_counter import FlopCounterMode

from clear_dit.kernels import choice
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.flex import flex_attention
from clear_dit.kernels.two_positions import Scaled, two_position_attention
from clear_dit.kernels.window import Window

# The tiled path without its compiled kernel.
OPERATORS = "tiled by PyTorch's operators"
WINDOWS = {
    "disc": Window(9, 11, 0, 4),
    "pooled": Window(9, 11, 0, 3, 2),
    "counts": Window(7, 10, 0, 3, 4, pooled_weight="count"),
    "far": Window(9, 11, 0, 2, far_levels=3),
    "past the diagonal": Window(4, 6, 0, 20),
    "itself": Window(5, 9, 0, 1),
    "one token": Window(1, 1, 0, 2, far_levels=1),
}
needs_triton = pytest.mark.skipif(not interpreted, reason="needs Triton and its interpreter")


@pytest.fixture
def run(monkeypatch):
    """`local_attention` by an implementation, all of which can run here."""
    monkeypatch.setitem(choice._WHY_NOT, "triton", choice.runs_everywhere)

    def by(impl, window):
        if impl == OPERATORS:
            switch_off(monkeypatch)
        impl = "tiled" if impl == OPERATORS else impl

        def attend(query, key, value, weight=None, offset=None, **options):
            options |= {"spatial_weight": weight, "far_offset": offset}
            return local_attention(query, key, value, window, impl=impl, **options)

        return attend

    return by


BY_TORCH = list(product(["reference", "tiled", OPERATORS], [torch.float32, torch.bfloat16]))


@pytest.mark.parametrize(("impl", "dtype"), BY_TORCH, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_is_the_definition(run, impl, dtype, name):
    case = problem(WINDOWS[name], batch=1, heads=1, head_dim=16, group=2)
    check(run(impl, WINDOWS[name]), case, dtype)


@needs_triton
@pytest.mark.parametrize("name", slow_but(WINDOWS, "itself", "one token"))
def test_triton_is_the_definition(run, name):
    case = problem(WINDOWS[name], batch=1, heads=1, head_dim=16, group=2)
    check(run("triton", WINDOWS[name]), case, torch.float16)


@slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", WINDOWS)
def test_flex_is_the_definition(name):
    window = WINDOWS[name]

    def attend(query, key, value, weight, offset):
        return flex_attention(
            query, key, value, window,
            scale=0.25, spatial_weight=weight, far_offset=offset, compiled=False,
        )[0]  # fmt: skip

    case = problem(window, batch=1, heads=1, head_dim=16, group=2)
    check(attend, case, torch.float32, gradients=False)


@pytest.mark.parametrize(
    "impl", ["reference", "tiled", OPERATORS, pytest.param("triton", marks=needs_triton)]
)
def test_some_rows_and_log_sum_exp(run, impl):
    """As a rank has them that holds a part of the image."""
    window = Window(5, 7, 0, 2, far_levels=2)
    rows = replace(window, query_rows=(1, 3))
    query, key, value, weight, offset, _ = inputs(
        **problem(window, batch=1, heads=1, head_dim=16), dtype=torch.float32
    )
    own = slice(window.width, 3 * window.width)
    out, lse = run(impl, rows)(query[:, own], key, value, weight, offset, return_lse=True)
    exact, exact_lse = local_attention(
        *(x.double() for x in (query, key, value)), window, spatial_weight=weight,
        far_offset=offset, impl="reference", return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), exact[:, own], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse[:, own], rtol=1e-4, atol=1e-5)


@needs_triton
@pytest.mark.parametrize(
    "window", slow_but([Window(4, 6, 0, 2), Window(5, 6, 0, 2, far_levels=2)], Window(4, 6, 0, 2))
)
def test_two_positions_by_triton(run, window):
    """Of equal positions it is local attention; the other implementations: test_two_positions."""
    run("triton", window)
    query, key, value, *_ = inputs(
        **problem(window, batch=1, heads=1, head_dim=16, group=2), dtype=torch.float16
    )
    near = query, key
    out = two_position_attention(near, Scaled(lambda: near), value, window, impl="triton")
    exact = attention_by_definition(*(x.double() for x in (*near, value)), window, 16**-0.5)
    assert relative_error(out, exact) < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("name", ["disc", "counts", "far"])
def test_custom_op_is_well_formed_and_counted(name):
    window = WINDOWS[name]
    case = problem(window, batch=1, heads=1, head_dim=16, group=2)
    query, key, value, *_ = inputs(**case, dtype=torch.float32)
    check_operator("tiled", *(x.requires_grad_() for x in (query, key, value)), window)
    with FlopCounterMode(display=False) as counter:
        local_attention(query, key, value, window, impl="tiled")
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.clear_dit.tiled_attention] == window.attention_flops(2, 16)
