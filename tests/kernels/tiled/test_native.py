"""The compiled kernel: the definition, every number format, threads, forks."""

import functools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agreement import FAR, HALVES, WIDE, check, inputs, problem, problems
from support.compiled import needs_compiler, switch_off
from support.slow import slow

from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.merge import merge
from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.pooling import pooled_bias, pooled_keys
from clear_dit.kernels.tiled import bands
from clear_dit.kernels.tiled.native.forward import (
    LARGEST_GRID,
    attend_compiled,
    executed_pairs,
    why_not_compiled,
)
from clear_dit.kernels.window import Window

pytestmark = needs_compiler


@pytest.fixture
def threads():
    """Sets the number of threads; as before afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def compiled(query, key, value, pooled, bias, window):
    """(out, lse, pairs) of `attend_compiled`."""
    out, lse = torch.full_like(query, float("nan")), torch.full(query.shape[:-1], float("nan"))
    geometry = Geometry.of(window, query.shape[-1] ** -0.5)
    pairs = attend_compiled(query, key, value, *pooled, bias, out, lse, geometry)
    return out, lse, pairs


def image_queries(query, key, value, window, dense=0):
    """The same where the first of the image's keys are seen by all once more."""
    pooled, bias = (key[:, :dense], value[:, :dense]), torch.empty(0, key.shape[2])
    return compiled(query, key, value, pooled, bias, window)


def average(value, window):
    """Over the values that a query sees: all scores are 0."""
    zero = torch.zeros_like(value)
    return image_queries(zero, zero, value, window)[0]


def check_kernel(case, dtype):
    window = case["window"]

    def run(query, key, value, weight, offset=None):
        assert why_not_compiled(query, window.height, window.width) is None
        return local_attention(
            query, key, value, window, spatial_weight=weight, far_offset=offset, impl="tiled"
        )

    check(run, case, dtype, gradients=False)


@pytest.mark.parametrize(
    ("case", "dtype", "count"),
    [
        (problem(WIDE, batch=3), torch.float16, 2),
        (problem(Window(38, 21, 64, 4), head_dim=13), torch.float32, 2),
        (problem(Window(40, 6, 3, 80, 2), head_dim=128), torch.bfloat16, 2),
        pytest.param(problem(FAR), torch.float32, 2, marks=slow),
        pytest.param(problem(FAR, batch=1, heads=3, group=2), torch.float32, 2, marks=slow),
        (problem(Window(9, 14, 5, 3), batch=1, heads=12, group=4, head_dim=128), torch.bfloat16, 2),
        (problem(FAR, batch=3, head_dim=13), torch.float16, 3),
        pytest.param(problem(Window(51, 67, 3, 2, far_levels=10)), torch.bfloat16, 1, marks=slow),
    ],
)
def test_kernel_is_the_definition(threads, case, dtype, count):
    threads(count)
    check_kernel(case, dtype)


@slow
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    case=problems() | problems(far=True),
    dtype=st.sampled_from((torch.float32, *HALVES)),
    count=st.integers(1, 3),
)
def test_any_problem_is_the_definition(threads, case, dtype, count):
    threads(count)
    check_kernel(case, dtype)


@pytest.mark.parametrize("window", [Window(26, 57, 9, 5, 2), Window(7, 18, 0, 30)], ids=str)
def test_both_paths_agree(monkeypatch, window):
    """Log-sum-exp too, and with rows of queries, whatever the strides."""
    rows = Window(window.height, window.width, window.text_length, window.radius,
                  window.down_factor, query_rows=(3, 7))  # fmt: skip
    query, key, value, *_ = inputs(**problem(window, batch=3), dtype=torch.float32)
    packed = torch.stack([query, key, value], dim=-2).transpose(1, 2).contiguous()
    start, stop = (window.text_length + row * window.width for row in rows.query_rows)
    found = []
    for _ in range(2):
        views = [packed[..., index, :].transpose(1, 2) for index in range(3)]
        found.append([
            *local_attention(*views, window, impl="tiled", return_lse=True),
            *local_attention(views[0][:, start:stop], *views[1:], rows,
                             impl="tiled", return_lse=True),
        ])  # fmt: skip
        switch_off(monkeypatch)
    torch.testing.assert_close(*found, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found[0][0][:, start:stop], found[0][2], rtol=1e-5, atol=2e-6)


def test_pairs_are_counted(threads):
    """What the kernel computed is what `executed_pairs` says, however it was shared out."""
    rows = Window(45, 10, 0, 4, query_rows=(6, 39))
    some = dict(query_rows=(9, 12), key_rows=((5, 20), (3, 9), (6, 6), (0, 1), (1, 1)))
    for count, window in (
        (1, Window(19, 26, 37, 4)), (3, Window(45, 9, 0, 1)), (2, rows), (2, Window(6, 7, 3, 90)),
        (1, Window(19, 26, 5, 4, 2, pooled_weight="count")), (2, FAR),
        (2, Window(45, 38, 0, 2, far_levels=9)), (1, Window(1, 1, 0, 2, far_levels=2)),
        (2, replace(FAR, query_rows=(6, 19))), (2, replace(FAR, **some)),
    ):  # fmt: skip
        threads(count)
        query = torch.randn(2, window.query_length, 3, 24)
        key, pooled = (
            torch.randn(2, length, 3, 24) for length in (window.key_length, window.pooled_length)
        )
        bias = pooled_bias(window, 3, None, query.device)
        pairs = compiled(query, key, key, (pooled, pooled), bias, window)[2]
        assert pairs == 2 * 3 * executed_pairs(window, 24)
    for window, most in ((Window(64, 64, 0, 8), 1.6), (Window(64, 64, 0, 4, far_levels=9), 2)):
        exact = window.attended_pairs()
        assert exact < executed_pairs(window, 24) < most * exact


ALL = ((0, 21), (0, 11), (0, 6), (0, 3), (0, 2))
NONE = ((0, 0),) * 5
SPLITS = {
    "near and far": ((ALL[0], *NONE[1:]), (NONE[0], *ALL[1:])),
    "above and below": (
        ((0, 9), (0, 4), (0, 3), (0, 1), (0, 2)),
        ((9, 21), (4, 11), (3, 6), (1, 3), (2, 2)),
    ),
    "all and nothing": (ALL, NONE),
    "nothing twice": (NONE, NONE, ALL),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_the_keys_merge_to_the_whole(split, dtype):
    """Rows of tokens and of cells, each given to one part; whoever sees nothing there gets 0."""
    whole = replace(FAR, text_length=0)
    query, key, value, weight, offset, _ = inputs(**problem(whole), dtype=dtype)
    pooled = pooled_keys(key, value, whole, weight, query.shape[-1] ** -0.5)
    rows = replace(whole, query_rows=(3, 14))
    query = query[:, 3 * FAR.width : 14 * FAR.width]
    found = []
    for key_rows in SPLITS[split]:
        window = replace(rows, key_rows=key_rows)
        first = (sum(whole.cells_of_level(one) for one in range(1, level)) for level in range(1, 5))
        cells = [
            at + row * -(-FAR.width // 2**level) + column
            for level, at in enumerate(first, 1)
            for row in range(*key_rows[level])
            for column in range(-(-FAR.width // 2**level))
        ]
        tokens = slice(*(row * FAR.width for row in key_rows[0]))
        part = [x[:, cells] for x in pooled]
        out, lse, _ = compiled(
            query, key[:, tokens], value[:, tokens], part,
            pooled_bias(window, 2, offset, query.device), window,
        )  # fmt: skip
        blind = ~window.mask().any(1)
        assert (out[:, blind] == 0).all()
        assert (lse[:, blind] < -1e20).all()
        found.append((out.float(), lse))
    out, lse = functools.reduce(lambda one, other: merge(*one, *other), found)
    expected, expected_lse = local_attention(
        query, key, value, rows, far_offset=offset, pooled=pooled,
        impl="reference", return_lse=True,
    )  # fmt: skip
    rounding = dict(rtol=2e-2, atol=2e-3) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=4e-6)
    torch.testing.assert_close(out, expected.float(), **rounding)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_are_read_and_written_exactly(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = every[every.isfinite()]
    value = torch.zeros(2**16, dtype=dtype)
    value[: len(finite)] = finite
    value = value.view(1, -1, 1, 64)
    out = average(value, Window(32, 32, 0, 1))
    assert torch.equal(out, value)
    for special in (float("inf"), float("-inf"), float("nan")):
        value = torch.full((1, 1, 1, 64), special, dtype=dtype)
        out = average(value, Window(1, 1, 0, 1))
        torch.testing.assert_close(out, value, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_are_rounded_as_torch_does(dtype):
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(-(2**15), 2**15, (1, 2, 2000, 64), generator=generator)
    value = value.to(torch.int16).view(dtype)
    value = torch.where(value.isfinite(), value, 0)
    out = average(value, Window(1, 2, 0, 2))
    mean = (value.double().sum(dim=1, keepdim=True) / 2).float().expand(out.shape)
    normal = (mean == 0) | (mean.abs() > torch.finfo(torch.float32).tiny)
    exact = value.float().sum(dim=1, keepdim=True).double() == value.double().sum(1, True)
    assert torch.equal(out[normal & exact], mean.to(dtype)[normal & exact])
    assert (normal & exact).double().mean() > 0.5


@pytest.mark.parametrize("size", [1.0, 30.0, 3000.0])
def test_scores_of_any_size(size):
    """A softmax over few keys, of scores that differ by up to 1e7: never NaN."""
    window = Window(24, 24, 0, 5)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 576, 2, 24, generator=generator)
    out, lse, _ = image_queries(query * size, key * size, value, window, dense=40)
    scores = torch.einsum("bqhd,bkhd->bqhk", query.double() * size, key.double() * size) * 24**-0.5
    mask = window.mask()[None, :, None]
    scores = torch.cat([scores.masked_fill(~mask, float("-inf")), scores[..., :40]], dim=-1)
    values = torch.cat([value, value[:, :40]], dim=1).double()
    exact = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), values)
    rounding = 4 * torch.finfo(torch.float32).eps * float(scores[scores.isfinite()].abs().max())
    assert (lse - scores.logsumexp(-1)).abs().max() < rounding
    assert (out - exact).norm() < (1e-6 + rounding) * exact.norm()


def test_not_a_number_stays():
    query, key, value = torch.randn(3, 1, 64, 1, 24)
    key[0, 9] = float("nan")
    out = image_queries(query, key, value, Window(8, 8, 0, 3))[0]
    assert out[0, 9].isnan().all()
    assert out[0, 36:].isfinite().all()


def test_what_it_does_not_take():
    query = torch.empty(1, 1, 1, 24)
    for other, height, words in (
        (query.double(), 8, "takes float16, bfloat16 or float32, got torch.float64"),
        (torch.empty(1, 1, 1, 129), 8, "takes a head_dim of 1 to 128, got 129"),
        (query.to("meta"), 8, "needs a CPU, got tokens on 'meta'"),
        (query, LARGEST_GRID, "takes at most 16384 rows and columns, got 16384 + 8"),
    ):
        assert why_not_compiled(other, height, 8) == words
    window = Window(9, 11, 5, 3)
    check(
        lambda q, k, v, *_: local_attention(q, k, v, window, impl="tiled"),
        problem(window, head_dim=160),
        torch.float32,
    )
    assert bands.executed_pairs(query.double(), window) != bands.executed_pairs(query, window)


FORK = """
import os, torch
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window
torch.set_num_threads(2)
window = Window(40, 12, 0, 3)
query, key, value = torch.randn(3, 1, 480, 2, 24)
expected = local_attention(query, key, value, window, impl="tiled")
child = os.fork()
if not child:
    same = torch.equal(local_attention(query, key, value, window, impl="tiled"), expected)
    os._exit(0 if same else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


THREAD = """
import threading, torch
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window
torch.set_num_threads(2)
query = torch.randn(1, 480, 2, 24)
def generate():
    threading.main_thread().join()
    print(local_attention(query, query, query, Window(40, 12, 0, 3), impl="tiled").shape)
threading.Thread(target=generate).start()
"""


@slow
def test_a_thread_that_outlives_the_main_one_computes_too():
    done = subprocess.run([sys.executable, "-c", THREAD], capture_output=True, timeout=120)
    assert done.stdout.strip() == b"torch.Size([1, 480, 2, 24])", done.stderr


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_process_computes_too():
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)
