"""Groups of query heads that read one key head: as if keys were repeated, which they are not."""

import re
from dataclasses import replace

import pytest
import torch
from support.agreement import FAR, forward_and_gradients, inputs, problem
from support.compiled import needs_compiler, switch_off
from support.live_memory import LiveMemory
from support.operators import check_operator
from support.oracle import attention_by_definition, relative_error, repeated
from support.slow import slow
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.dense import dense_attention
from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.pooling import pooled_bias, pooled_keys
from clear_dit.kernels.tiled import bands
from clear_dit.kernels.tiled.backward import backward_in_bands
from clear_dit.kernels.window import Window

GROUP = 3
# The tiled path without its compiled kernel.
OPERATORS = "tiled by PyTorch's operators"
WINDOWS = {
    "disc": Window(13, 18, 7, 4),
    "pooled": Window(9, 14, 0, 4, 4),
    "counts": Window(9, 14, 5, 4, 4, pooled_weight="count"),
    "far": FAR,
    "far without text": Window(9, 14, 0, 2, far_levels=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "tiled", OPERATORS])
@pytest.mark.parametrize("name", WINDOWS)
def test_as_if_keys_were_repeated(name, impl, dtype, monkeypatch):
    """Output and log-sum-exp bit for bit; what is summed over a group, but for the roundings.

    PyTorch's logarithms of whole vectors and of single numbers differ by one.
    """
    rounding = torch.finfo(torch.float32).eps if impl == OPERATORS else 0
    if impl == OPERATORS:
        switch_off(monkeypatch)
        impl = "tiled"
    window = WINDOWS[name]
    tensors = inputs(**problem(window, batch=1, group=GROUP), dtype=dtype)

    def results(times):
        lses = []

        def run(query, key, value, weight, offset):
            out, lse = local_attention(
                query, repeated(key, times), repeated(value, times), window, impl=impl,
                spatial_weight=weight, far_offset=offset, return_lse=True,
            )  # fmt: skip
            lses.append(lse)
            return out

        return forward_and_gradients(run, *tensors), *lses

    (found, lse), (expected, expected_lse) = results(1), results(GROUP)
    assert relative_error(found[0], expected[0]) <= rounding
    assert relative_error(lse, expected_lse) <= rounding
    # Each of a group's gradients is rounded before they are summed, and the sum once more.
    rounding = max(2 * torch.finfo(dtype).eps, 64 * torch.finfo(torch.float32).eps)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) < rounding


@pytest.mark.parametrize("queries", [1, 40])
def test_dense_attention(queries):
    query, key, value = torch.randn(2, queries, 6, 16), *torch.randn(2, 2, 50, 2, 16)
    found = dense_attention(query, key, value, scale=0.3)
    expected = dense_attention(query, *(repeated(x, 3) for x in (key, value)), scale=0.3)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@needs_compiler
def test_the_heads_of_krea_2():
    """48 on 12, of 128 channels."""
    window = Window(6, 9, 4, 3)
    query, key, value, *_ = inputs(
        **problem(window, batch=1, heads=12, group=4, head_dim=128), dtype=torch.bfloat16
    )
    out = local_attention(query, key, value, window)
    assert out.shape == (1, 58, 48, 128)
    exact = attention_by_definition(*(x.double() for x in (query, key, value)), window, 128**-0.5)
    plain = attention_by_definition(query, key, value, window, 128**-0.5)
    eps = torch.finfo(torch.bfloat16).eps
    assert relative_error(out, exact) < 2 * relative_error(plain, exact) + 2 * eps


BIG = Window(400, 16, 32, 3)


def memory_beside(run, window):
    """Bytes beside what `run` is given, 16 query heads on one key head, and what it returns.

    And the bytes that one tensor of all query heads takes. `run` is what an operator does, which
    from outside is not seen.
    """
    for _ in range(2):  # what is remembered of a window is made by the first
        with LiveMemory() as memory:
            query = torch.randn(1, window.sequence_length, 16, 32)
            key, value = torch.randn(2, 1, window.sequence_length, 1, 32)
            bias = pooled_bias(window, 16, None, query.device)
            given = query, key, value, *pooled_keys(key, value, window, None, 0.2), bias
            results = run(*given, Geometry.of(window, 0.2))
    storages = {x.untyped_storage().data_ptr(): x for x in (*given, *results)}
    known = sum(x.untyped_storage().nbytes() for x in storages.values())
    return memory.peak - known, query.nbytes


@slow
@pytest.mark.parametrize("impl", [pytest.param("tiled", marks=needs_compiler), OPERATORS])
@pytest.mark.parametrize("window", [BIG, replace(BIG, far_levels=3)], ids=["disc", "far"])
def test_keys_are_not_repeated_in_memory(impl, window, monkeypatch):
    if impl == OPERATORS:
        switch_off(monkeypatch)
    beside, repeated_keys = memory_beside(bands._forward, window)
    assert beside < repeated_keys / 2


def test_nor_are_they_before_the_operator():
    def run(query, key, value, *others):
        return [local_attention(query, key, value, BIG, impl="tiled", scale=0.2)]

    beside, repeated_keys = memory_beside(run, BIG)
    assert beside < repeated_keys / 2


@slow
def test_gradients_of_keys_are_not_repeated_in_memory():
    def run(query, *others):
        lse = query.new_zeros(query.shape[:-1])
        return backward_in_bands(query, query, *others[:-1], query, lse, others[-1])

    beside, repeated_keys = memory_beside(run, BIG)
    assert beside < repeated_keys / 2


@pytest.mark.parametrize("window", [Window(5, 6, 3, 3, 2), Window(5, 6, 0, 2, far_levels=3)])
def test_custom_op_is_well_formed(window):
    query, key, value, *_ = inputs(**problem(window, group=GROUP), dtype=torch.float32)
    check_operator("tiled", *(x.requires_grad_() for x in (query, key, value)), window)


def test_compiled_and_counted():
    window = Window(6, 5, 3, 2, far_levels=2)
    leaves = [
        x.requires_grad_()
        for x in inputs(**problem(window, batch=1, group=GROUP), dtype=torch.float32)[:3]
    ]

    def run(query, key, value):
        return local_attention(query, key, value, window, impl="tiled") * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        forward_and_gradients(
            lambda q, k, v, *_: compiled(q, k, v), *leaves, None, None, leaves[0]
        ),
        forward_and_gradients(lambda q, k, v, *_: run(q, k, v), *leaves, None, None, leaves[0]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    with FlopCounterMode(display=False) as counter:
        run(*leaves)
    assert counter.get_total_flops() == window.attention_flops(2 * GROUP, 32)


def test_nothing_is_computed_to_know_the_shapes():
    """Krea 2 at 4096 px: 256 x 256 tokens."""
    window = Window(256, 256, 512, 8)
    with FakeTensorMode():
        query = torch.empty(1, window.sequence_length, 48, 128, dtype=torch.bfloat16)
        query.requires_grad_()
        key = torch.empty(1, window.sequence_length, 12, 128, dtype=torch.bfloat16)
        key.requires_grad_()
        out, lse = local_attention(query, key, key, window, impl="tiled", return_lse=True)
        grads = torch.autograd.grad(out.sum(), (query, key))
    assert (out.shape, lse.shape) == (query.shape, query.shape[:3])
    assert [x.shape for x in grads] == [query.shape, key.shape]


@pytest.mark.parametrize(
    ("heads", "key_heads", "value_heads", "message"),
    [
        (4, 3, 3, "query's heads must be a multiple of key's, got 4 and 3."),
        (2, 4, 4, "query's heads must be a multiple of key's, got 2 and 4."),
        (2, 0, 0, "query's heads must be a multiple of key's, got 2 and 0."),
        (4, 2, 4, "value must be (batch, sequence, key heads, head_dim), here (1, 16, 2, 8), got"),
        (4, 2, 1, "value must be (batch, sequence, key heads, head_dim), here (1, 16, 2, 8), got"),
    ],
)
def test_other_heads_are_refused(heads, key_heads, value_heads, message):
    query, key, value = (torch.randn(1, 16, count, 8) for count in (heads, key_heads, value_heads))
    with pytest.raises(ValueError, match=re.escape(message)):
        local_attention(query, key, value, Window(4, 4, 0, 2))
