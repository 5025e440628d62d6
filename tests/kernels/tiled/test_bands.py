"""What the tiled path promises beside being right: linear work, and a well-behaved custom op."""

import functools
import subprocess
import sys

import pytest
import torch
from support.agreement import FAR
from support.compiled import needs_compiler, switch_off
from support.operators import check_operator
from support.slow import slow, slow_but
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from clear_dit.kernels import flex
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.tiled import bands as tiled
from clear_dit.kernels.tiled import lists, partial, views
from clear_dit.kernels.tiled.lists import executed_tile_pairs
from clear_dit.kernels.tiled.tiles import TILE_COLUMNS, bands, tile_bias, tile_columns
from clear_dit.kernels.window import Window

POOLINGS = (
    {},
    {"down_factor": 2},
    {"down_factor": 2, "pooled_weight": "count"},
    {"far_levels": 3},
)


def tensors(window, batch=1, heads=2, head_dim=16, requires_grad=False):
    shape = (batch, window.sequence_length, heads, head_dim)
    return [torch.randn(shape, requires_grad=requires_grad) for _ in range(3)]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 65])
@pytest.mark.parametrize("radius", [1, 2, 8, 100])
def test_tiles_cover_every_query_and_every_key_it_can_reach(length, radius):
    rows = {}
    for band in bands(length, radius):
        for y in range(band.start, band.stop):
            rows[y] = range(band.key_start, band.key_stop)
    columns = tile_columns(length, radius)
    assert columns.query_width >= length
    for x in range(length):
        first = x // TILE_COLUMNS * columns.stride - columns.padding
        for keys in (rows[x], range(first, first + columns.key_length)):
            for key in range(max(0, x - radius + 1), min(length, x + radius)):
                assert key in keys
        assert first + columns.key_length <= columns.key_width - columns.padding


def test_mask_is_left_out_where_all_is_inside():
    band, columns, device = next(bands(8, 30)), tile_columns(8, 30), torch.device("cpu")
    every = range(columns.count)
    assert tile_bias(band, columns, every, 30, torch.float32, device) is None
    assert tile_bias(band, columns, every, 3, torch.float32, device) is not None


@pytest.mark.parametrize("elements", [1, 5000])
@pytest.mark.parametrize("levels", [0, 4])
def test_large_masks_are_made_in_groups(monkeypatch, elements, levels):
    switch_off(monkeypatch)
    window = Window(19, 30, 3, 4, far_levels=levels)
    query, key, value = tensors(window, requires_grad=True)
    expected = local_attention(query, key, value, window, impl="tiled")
    gradients = torch.autograd.grad(expected.square().sum(), (query, key, value))
    monkeypatch.setattr(views, "MASK_ELEMENTS", elements)
    monkeypatch.setattr(lists, "GROUP_ELEMENTS", 20 * elements)
    monkeypatch.setattr(lists, "REMEMBERED", 0)
    out = local_attention(query, key, value, window, impl="tiled")
    torch.testing.assert_close(out, expected)
    for grad, other in zip(
        torch.autograd.grad(out.square().sum(), (query, key, value)), gradients, strict=True
    ):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[needs_compiler, slow])])
def test_work_is_linear_in_the_tokens(monkeypatch, compiled):
    if not compiled:
        switch_off(monkeypatch)
    executed_pairs = functools.partial(tiled.executed_pairs, torch.empty(1, 1, 1, 16))
    small, large = Window(64, 64, 512, 8), Window(512, 512, 512, 8)
    assert executed_pairs(large) / executed_pairs(small) < 1.1 * 64
    assert executed_pairs(large) / large.attended_pairs() < (1.1 if compiled else 1.3)
    assert flex.executed_pairs(Window(64, 64, 512, 8)) > executed_pairs(small)


def test_work_with_far_keys_is_almost_linear(monkeypatch):
    """A level more for four times the tokens; what is masked is about what a disc's tiles mask."""
    switch_off(monkeypatch)
    small, large = (Window(side, side, 512, 4, far_levels=8) for side in (64, 256))
    executed = [tiled.executed_pairs(torch.empty(1, 1, 1, 16), x) for x in (small, large)]
    assert executed[1] / executed[0] < 1.3 * 16
    assert executed[1] / large.attended_pairs() < 1.6


@pytest.mark.parametrize(
    "window",
    [Window(19, 26, 5, 4, 2), Window(19, 26, 5, 4, 2, pooled_weight="count"), FAR],
    ids=str,
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_executed_pairs_counts_what_runs(monkeypatch, compiled, window):
    if not compiled:
        switch_off(monkeypatch)
    query, key, value = tensors(window)
    pairs = 0
    attend, attend_compiled = tiled.attend, tiled.attend_compiled

    def counting(query, key, value, scale, bias=None):
        nonlocal pairs
        pairs += query.shape[0] * query.shape[2] * key.shape[2]
        return attend(query, key, value, scale, bias)

    def counting_compiled(query, *args):
        nonlocal pairs
        pairs += attend_compiled(query, *args) // query.shape[2]

    for module in (tiled, partial):
        monkeypatch.setattr(module, "attend", counting)
    monkeypatch.setattr(tiled, "attend_compiled", counting_compiled)
    local_attention(query, key, value, window, impl="tiled")
    assert pairs == tiled.executed_pairs(query, window)
    if not compiled:
        assert pairs == executed_tile_pairs(window)


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_custom_op_is_well_formed(pooling):
    window = Window(9, 6, 3, 3, **pooling)
    query, key, value = tensors(window, requires_grad=True)
    check_operator("tiled", query, key, value, window)


@pytest.mark.parametrize("pooling", slow_but(POOLINGS, {}, {"far_levels": 3}), ids=str)
def test_no_graph_break_under_compile(pooling):
    window = Window(9, 17, 3, 3, **pooling)
    query, key, value = tensors(window, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(query, key, value):
        return local_attention(query, key, value, window, impl="tiled") * 2

    out = run(query, key, value)
    expected = local_attention(query, key, value, window, impl="tiled") * 2
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    for grad, other in zip(
        grads, torch.autograd.grad(expected.sum(), (query, key, value)), strict=True
    ):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("levels", [0, 10])
def test_8k_image_under_fake_tensors(levels):
    window = Window(512, 512, 512, 8, far_levels=levels)
    with FakeTensorMode():
        shape = (1, window.sequence_length, 24, 128)
        query, key, value = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(3))
        out, lse = local_attention(query, key, value, window, impl="tiled", return_lse=True)
    assert out.shape == shape
    assert out.dtype == torch.bfloat16
    assert lse.shape == shape[:-1]


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_flop_counter_counts_the_windows_flops(pooling):
    window = Window(12, 10, 5, 3, **pooling)
    query, key, value = tensors(window, batch=2, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = local_attention(query, key, value, window, impl="tiled")
    counts = counter.get_flop_counts()["Global"]
    exact = 2 * window.attention_flops(heads=2, head_dim=16)
    assert counts[torch.ops.clear_dit.tiled_attention] == exact
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.clear_dit.tiled_attention_backward] == 5 * exact // 2


MEMORY = """
import torch
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.window import Window
from clear_dit.memory import peak_mb, reset_peak
device = torch.device("cpu")
def measure(side):
    window = Window(side, side, 16, 4)
    query, key, value = (torch.randn(1, window.sequence_length, 4, 32) for _ in range(3))
    reset_peak(device)
    before = peak_mb(device)
    local_attention(query, key, value, window, impl="tiled")
    return peak_mb(device) - before
measure(64)  # what is made once
print(measure(256), measure(512))
"""


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_linear():
    """Four times the tokens, four times the memory on top of the inputs (a mask: 64 GiB)."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True
    )
    small, large = map(float, done.stdout.split())
    output_mb = 512 * 512 * 4 * 32 * 4 / 2**20
    assert large < 4.4 * small
    assert large < 2 * output_mb
