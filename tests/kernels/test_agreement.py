"""Every implementation against the definition in float64: output, log-sum-exp, all gradients.

The rule for the tolerance is in support/agreement.py.
"""

import functools
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from support.agreement import FAR, WIDE, check, forward_and_gradients, inputs, problem, problems
from support.compiled import switch_off
from support.oracle import attention_by_definition, mask_by_definition
from support.slow import slow, slow_but

from clear_dit.kernels import flex
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.flex import flex_attention
from clear_dit.kernels.tiled import backward, bands, partial
from clear_dit.kernels.tiled.tiles import tile_columns
from clear_dit.kernels.window import Window

# The tiled path without its compiled kernel.
OPERATORS = "tiled by PyTorch's operators"


def run_impl(impl, window):
    def run(query, key, value, weight, offset=None):
        return local_attention(
            query, key, value, window, spatial_weight=weight, far_offset=offset, impl=impl
        )

    return run


def test_wide_has_overlapping_tiles():
    columns = tile_columns(WIDE.width, WIDE.radius)
    assert 0 < columns.stride < columns.key_length
    assert columns.query_width > WIDE.width


thorough = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


CASES = {
    "pooled": problem(Window(9, 17, 7, 4, 4)),
    "itself": problem(Window(16, 8, 0, 1)),
    "wide heads": problem(Window(8, 24, 1, 9, 2), batch=3, head_dim=128),
    "overlapping tiles": problem(WIDE),
    "no text": problem(Window(26, 70, 0, 6), batch=1),
    "counts": problem(Window(14, 19, 3, 4, 4, pooled_weight="count")),
    "grouped heads": problem(Window(9, 33, 7, 4, 2), batch=1, group=3),
    "grouped heads without text": problem(Window(9, 11, 0, 4), batch=1, heads=3, group=2),
    "grouped heads, counts": problem(Window(9, 11, 3, 4, 4, pooled_weight="count"), group=2),
}


@pytest.mark.parametrize(
    ("impl", "dtype"),
    slow_but(
        product(["reference", "tiled", OPERATORS], [torch.float32, torch.bfloat16]),
        ("tiled", torch.float32),
    ),
    ids=str,
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_implementation_is_the_definition(monkeypatch, impl, dtype, case):
    if impl == OPERATORS:
        switch_off(monkeypatch)
        impl = "tiled"
    check(run_impl(impl, case["window"]), case, dtype)


@slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "tiled", OPERATORS])
@thorough
@given(case=problems())
def test_any_problem_is_the_definition(monkeypatch, impl, dtype, case):
    if impl == OPERATORS:
        switch_off(monkeypatch)
        impl = "tiled"
    check(run_impl(impl, case["window"]), case, dtype)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    slow_but(product(["reference", OPERATORS], [torch.float32, torch.bfloat16])),
    ids=str,
)
@settings(thorough, max_examples=12)
@given(case=problems(far=True))
@example(case=problem(FAR))
@example(case=problem(FAR, heads=3, group=2, batch=1))
@example(case=problem(Window(18, 41, 0, 2, far_levels=10), batch=1, head_dim=64))
@example(case=problem(Window(9, 14, 3, 17, far_levels=3)))
def test_far_keys_are_the_definition(monkeypatch, impl, dtype, case):
    if impl == OPERATORS:
        switch_off(monkeypatch)
        impl = "tiled"
    check(run_impl(impl, case["window"]), case, dtype)


def check_flex_mask(case, dtype):
    """FlexAttention in its eager form: the same mask and block lists, not compiled."""
    window, scale = case["window"], case["head_dim"] ** -0.5

    def run(query, key, value, weight, offset=None):
        return flex_attention(
            query, key, value, window,
            scale=scale, spatial_weight=weight, far_offset=offset, compiled=False,
        )[0]  # fmt: skip

    check(run, case, dtype, gradients=False)


@slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "case",
    [problem(WIDE), problem(Window(9, 17, 0, 4)), problem(FAR, batch=1, heads=2, group=2)],
)
def test_flex_mask_is_the_definition(case):
    check_flex_mask(case, torch.float32)


@slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(thorough, max_examples=12)
@given(case=problems())
def test_flex_mask_of_any_problem_is_the_definition(dtype, case):
    check_flex_mask(case, dtype)


@slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (problem(Window(20, 13, 7, 3), head_dim=16), torch.float32),
        (problem(Window(20, 13, 0, 2, far_levels=3), group=3, head_dim=16), torch.float32),
        (problem(Window(18, 33, 64, 6, 4), batch=1, head_dim=64), torch.bfloat16),
    ],
)
def test_compiled_flex_is_the_definition(case, dtype):
    check(run_impl("flex", case["window"]), case, dtype, gradients=False)


@slow
def test_many_geometries_do_not_fall_back_to_dense(monkeypatch):
    """Past torch.compile's limit of recompilations flex must compile on, or raise."""
    compile_ = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(flex.torch, "compile", compile_)
    flex._compiled_flex_attention.cache_clear()
    try:
        for width in range(3, 14):
            window = Window(4, width, 1, 2)
            tensors = inputs(**problem(window, batch=1), dtype=torch.float32)[:3]
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                local_attention(*tensors, window, impl="flex")
    finally:
        flex._compiled_flex_attention.cache_clear()


@slow
@pytest.mark.parametrize(
    ("dtype", "heads", "group"), [(torch.float32, 2, 3), (torch.bfloat16, 1, 1)], ids=str
)
def test_tiled_without_fused_attention(monkeypatch, dtype, heads, group):
    """The form of the tiled path that runs on devices other than the CPU."""
    switch_off(monkeypatch)
    monkeypatch.setattr(partial, "has_flash", lambda device: False)
    for module in (partial, bands, backward):
        monkeypatch.setattr(module, "compute_dtype", lambda dtype, device: dtype)
    # 66 bands: what is merged so often must be held in float32.
    weighed = Window(11, 18, 7, 4, 2, pooled_weight="count")
    for window in (Window(11, 18, 7, 4, 2), weighed, FAR, Window(523, 8, 64, 3)):
        case = problem(window, batch=1, heads=heads, group=group)
        check(run_impl("tiled", window), case, dtype)


def test_float16_scores_do_not_overflow(monkeypatch):
    switch_off(monkeypatch)
    monkeypatch.setattr(partial, "has_flash", lambda device: False)
    for module in (partial, bands, backward):
        monkeypatch.setattr(module, "compute_dtype", lambda dtype, device: dtype)
    window = Window(8, 8, 2, 3)
    query = torch.full((1, 66, 1, 128), 23.0, dtype=torch.float16)
    out = local_attention(query, query, query, window, impl="tiled")
    torch.testing.assert_close(out, query, rtol=2e-3, atol=0)


@pytest.mark.parametrize("impl", slow_but(["reference", "tiled", "flex"], "reference", "tiled"))
def test_radius_past_the_diagonal_is_plain_attention(impl):
    window = Window(9, 14, 5, 17)
    query, key, value, *_ = inputs(**problem(window), dtype=torch.float32)
    out = local_attention(query, key, value, window, impl=impl)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value))
    )
    torch.testing.assert_close(out, dense.transpose(1, 2), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("impl", slow_but(["reference", "tiled", "flex"], "reference", "tiled"))
def test_radius_one_is_self_and_text(impl):
    window = Window(9, 10, 3, 1)
    query, key, value, *_ = inputs(**problem(window), dtype=torch.float32)
    out = local_attention(query, key, value, window, impl=impl)
    for token in (3, 20, 92):
        keys = [0, 1, 2, token]
        scores = torch.einsum("bhd,bkhd->bhk", query[:, token], key[:, keys]) * 32**-0.5
        expected = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), value[:, keys])
        torch.testing.assert_close(out[:, token], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("impl", ["reference", "tiled", "flex"])
@pytest.mark.parametrize("factor", [1, 4])
def test_log_sum_exp(impl, factor):
    window = Window(12, 20, 7, 4, factor)
    query, key, value, *_ = inputs(**problem(window), dtype=torch.float32)
    if impl == "flex":  # compiled for a CPU it has none
        _, lse = flex_attention(
            query, key, value, window, scale=32**-0.5, return_lse=True, compiled=False
        )
    else:
        _, lse = local_attention(query, key, value, window, impl=impl, return_lse=True)
    assert lse.shape == query.shape[:-1]
    assert not lse.requires_grad
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * 32**-0.5
    scores = scores.masked_fill(~mask_by_definition(window), float("-inf"))
    expected = scores.logsumexp(-1).transpose(1, 2)
    if factor == 1:
        torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)
    else:  # pooled keys add to image queries only
        torch.testing.assert_close(lse[:, :7], expected[:, :7], rtol=1e-5, atol=1e-5)
        assert (lse[:, 7:] > expected[:, 7:]).all()


def test_batch_items_do_not_meet():
    window = Window(10, 7, 4, 3, 2)
    query, key, value, *_ = inputs(**problem(window, batch=3), dtype=torch.float32)
    order = [2, 0, 1]
    for impl in ("reference", "tiled"):
        out = local_attention(query, key, value, window, impl=impl)
        shuffled = local_attention(query[order], key[order], value[order], window, impl=impl)
        torch.testing.assert_close(out[order], shuffled)


def test_strides_do_not_matter():
    window = Window(10, 19, 4, 3)
    query, key, value, *_ = inputs(**problem(window), dtype=torch.float32)
    packed = torch.stack([query, key, value], dim=-2).transpose(1, 2).contiguous()
    views = [packed[..., index, :].transpose(1, 2) for index in range(3)]
    assert not views[0].is_contiguous()
    channels_last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value)]
    assert channels_last[0].stride(-1) != 1
    for impl in ("tiled", "reference"):
        expected = forward_and_gradients(
            run_impl(impl, window), query, key, value, None, None, query
        )
        for strided in (views, channels_last):
            leaves = [x.detach().requires_grad_() for x in strided]
            out = local_attention(*leaves, window, impl=impl)
            grad = query.transpose(1, 3).contiguous().transpose(1, 3)
            received = (out, *torch.autograd.grad(out, leaves, grad))
            for value_, expected_ in zip(received, expected, strict=True):
                torch.testing.assert_close(value_, expected_)


def test_scale():
    window = Window(9, 9, 2, 3)
    query, key, value, *_ = inputs(**problem(window), dtype=torch.float32)
    expected = attention_by_definition(query, key, value, window, 0.3)
    for impl in ("tiled", "reference"):
        out = local_attention(query, key, value, window, scale=0.3, impl=impl)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@slow
def test_large_scores_stay_finite():
    """Whole key blocks can be masked before the first visible key: no NaN, no overflow."""
    window = Window(64, 64, 0, 30)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 4096, 1, 16, generator=generator) * 30
    out = local_attention(query, key, value, window, impl="tiled")
    expected = local_attention(query, key, value, window, impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-2)
