"""The benchmark's peers: each against its own definition, and refused by name where it cannot."""

import dataclasses
import json
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from support.command_line import run
from support.slow import slow
from torch.nn.functional import scaled_dot_product_attention

from clear_dit.bench import attention, peers
from clear_dit.bench.attention import Problem, bench_attention, errors_of, sampled_errors
from clear_dit.bench.executed import exact_keys
from clear_dit.bench.peers import (
    PEERS,
    _tiled_mask,
    sees_everything,
    sees_square,
    sees_window,
    tile_order,
    tiled_flex_attention,
)
from clear_dit.bench.timing import time_in_turn
from clear_dit.errors import RequestError
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.pooling import pooled_keys
from clear_dit.kernels.window import Window

CPU = torch.device("cpu")
WINDOW = Window(16, 32, 5, 4)


def tensors(window=WINDOW, dtype=torch.float32):
    return Problem(window, 2, 16, dtype, CPU).tensors()


def largest(errors):
    return max(each for each in errors if each is not None)


def error(*arguments):
    return largest(sampled_errors(*arguments))


def masked(query, key, value, mask):
    """Dense attention under a mask, (batch, sequence, heads, head_dim)."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


def all_rows(sees, window):
    return sees(window, torch.arange(window.sequence_length))


@pytest.mark.parametrize(
    "window",
    [
        *(WINDOW, Window(7, 9, 0, 30), Window(9, 6, 3, 2, 4)),
        *(Window(13, 22, 5, 2, far_levels=10), Window(9, 6, 0, 3, far_levels=2)),
    ],
)
def test_the_disc_is_the_windows_mask(window):
    assert torch.equal(all_rows(sees_window, window), window.mask())


def test_everything_but_pooled_keys():
    seen = all_rows(sees_everything, Window(4, 6, 3, 2, 2))
    assert seen[:, :27].all()
    assert not seen[:, 27:].any()


def test_the_square_is_moved_inside_at_borders():
    window = Window(6, 9, 2, 2)
    seen = all_rows(sees_square, window)
    assert seen[:2].all()
    assert seen[:, :2].all()
    image = seen[2:, 2:].unflatten(1, (6, 9))
    assert (image.sum(dim=(1, 2)) == 9).all()
    inner = image.unflatten(0, (6, 9))[3, 4]
    assert inner[2:5, 3:6].all()
    assert image[0, :3, :3].all()
    assert image[-1, 3:, 6:].all()
    # Inside the image it holds the disc.
    disc = all_rows(sees_window, window)[2:, 2:].unflatten(0, (6, 9))[1:-1, 1:-1]
    square = seen[2:, 2:].unflatten(0, (6, 9))[1:-1, 1:-1]
    assert (square | ~disc).all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("text", [0, 5])
def test_tiled_flex_attention_is_the_disc(text):
    window = Window(16, 32, text, 4)
    query, key, value = tensors(window)
    order = tile_order(window)
    assert torch.equal(order.sort().values, torch.arange(window.sequence_length))
    permuted = (x[:, order] for x in (query, key, value))
    out = tiled_flex_attention(*permuted, window, compiled=False)[:, order.argsort()]
    torch.testing.assert_close(out, masked(query, key, value, window.mask()))
    peer = PEERS["flex-tiled"]
    # 4 tiles of 128 tokens, each within reach of the next; text is one block more.
    assert peer.executed_pairs(query, window) == (4 + bool(text)) ** 2 * 128**2


@pytest.mark.parametrize("radius", [1, 8, 9, 30])
def test_blocks_are_skipped_and_full_exactly_where_the_mask_says(radius):
    window = Window(24, 64, 0, radius)
    order = tile_order(window)
    blocks = window.mask()[order][:, order].view(12, 128, 12, 128)
    mask = _tiled_mask(window, CPU)
    some, full = (
        blocks_of(counts, indices)
        for counts, indices in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert torch.equal(full, blocks.all(dim=3).all(dim=1))
    assert torch.equal(some | full, blocks.any(dim=3).any(dim=1))
    assert not (some & full).any()


def blocks_of(counts, indices):
    """A list of key blocks per query block as a boolean matrix."""
    listed = torch.arange(indices.shape[-1]) < counts[0, 0, :, None]
    return torch.zeros(indices.shape[2:], dtype=torch.bool).scatter(1, indices[0, 0].long(), listed)


def test_natten_adapter(monkeypatch):
    window = Window(8, 10, 5, 3)
    calls = []

    def na2d(query, key, value, kernel_size, additional_keys=None, additional_values=None):
        calls.append(kernel_size)
        assert query.shape == key.shape == value.shape == (1, 8, 10, 2, 16)
        key, value = (x.flatten(1, 2) for x in (key, value))
        if additional_keys is not None:
            key = torch.cat([additional_keys, key], dim=1)
            value = torch.cat([additional_values, value], dim=1)
        text = key.shape[1] - 80
        mask = all_rows(sees_square, Window(8, 10, text, (kernel_size[0] + 1) // 2))[text:]
        return masked(query.flatten(1, 2), key, value, mask).unflatten(1, (8, 10))

    fake = ModuleType("natten")
    fake.na2d = na2d
    monkeypatch.setitem(sys.modules, "natten", fake)
    for window in (Window(8, 10, 5, 3), Window(8, 10, 0, 3)):
        given = tensors(window)
        out = PEERS["natten"].run(*given, window)
        assert error(out, given, window, sees_square) < 1e-5
        assert error(out, given, window, sees_window) > 1e-2
        exact = all_rows(sees_square, window).sum()
        assert PEERS["natten"].executed_pairs(given[0], window) == exact
    assert calls == [(5, 5), (5, 5)]


def test_xformers_adapter(monkeypatch):
    def memory_efficient_attention(query, key, value):
        return masked(query, key, value, None)

    fake = ModuleType("xformers.ops")
    fake.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    given = tensors()
    assert error(PEERS["xformers"].run(*given, WINDOW), given, WINDOW, sees_everything) < 1e-5


def test_the_tiled_peer_by_flashs_kernel_asks_flex_attention_for_it(monkeypatch):
    asked = []

    def flex_attention(query, key, value, block_mask, kernel_options):
        asked.append(kernel_options)
        return query

    monkeypatch.setattr(peers, "torch_flex_attention", flex_attention)
    for name in ("flex-tiled", "flex-flash"):
        PEERS[name].run(*tensors(), WINDOW, compiled=False)
    assert asked == [None, {"BACKEND": "FLASH"}]


@pytest.mark.parametrize("name", ["xformers", "natten"])
def test_packages_need_a_gpu_too(monkeypatch, name):
    fake = ModuleType(name)
    fake.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, fake)
    reason = PEERS[name].why_not(tensors()[0], WINDOW, False)
    assert reason == "needs a CUDA device, got a query on 'cpu'"


@pytest.mark.parametrize(
    ("impls", "window", "message"),
    [
        ("sdpa-cudnn", WINDOW, "'sdpa-cudnn' cannot run here: it needs a CUDA device, got a query"),
        ("sdpa-flash", WINDOW, "'sdpa-flash' cannot run here: it needs a CUDA device, got a query"),
        ("xformers", WINDOW, "needs the package xformers, which is not installed"),
        ("natten", WINDOW, "needs the package natten, which is not installed"),
        ("flex-tiled", Window(12, 32, 5, 4), "a grid of whole 8 x 16 tiles, got 12 x 32 tokens"),
        ("flex-tiled", Window(16, 32, 5, 4, 2), "it has no pooled keys"),
        ("flex-flash", WINDOW, "needs the package flash_attn, which is not installed"),
        ("magic", WINDOW, "sdpa, auto, triton, flex, tiled, reference, sdpa-cudnn, sdpa-flash, x"),
    ],
)
def test_refusals_by_name(monkeypatch, impls, window, message):
    found = attention.PEERS["xformers"].why_not.__globals__["find_spec"]
    monkeypatch.setitem(
        attention.PEERS["xformers"].why_not.__globals__,
        "find_spec",
        lambda name: None if name in ("xformers", "natten", "flash_attn") else found(name),
    )
    with pytest.raises(RequestError, match=r"--impls") as error:
        bench_attention(Problem(window, 2, 16, torch.float32, CPU), ["tiled", impls], 1)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_exits_with_status_2(capsys):
    size = ("--height", 64, "--width", 64)
    assert run("bench", "attention", "--impls", "sdpa-cudnn", *size) == 2
    assert "sdpa-cudnn" in capsys.readouterr().err


def test_backward_is_checked_and_timed(capsys):
    options = "--height 128 --width 128 --radius 3 --heads 1 --head-dim 16 --text-length 4"
    command = f"bench attention {options} --impls tiled,sdpa --repeats 1 --backward --json"
    assert run(*command.split()) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["correct"] is True
    for row in result["rows"]:
        assert row["gradient_error"] < 1e-5
        assert row["backward_ms"] is not None


def test_wrong_gradients_are_not_timed(monkeypatch):
    right = attention.local_attention

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    def doubled(*inputs, return_lse=False, **options):
        out, lse = right(*inputs, return_lse=True, **options)
        return (out, lse) if return_lse else Doubled.apply(out)

    monkeypatch.setattr(attention, "local_attention", doubled)
    attention._gradient_error.cache_clear()
    problem = Problem(Window(8, 8, 2, 3), 1, 16, torch.float32, CPU)
    result = bench_attention(problem, ["tiled"], 1, backward=True)
    attention._gradient_error.cache_clear()
    (row,) = result["rows"]
    assert result["correct"] is False
    assert row["ms"] is row["backward_ms"] is None
    assert largest(errors_of(row)) < 1e-5
    assert row["gradient_error"] == pytest.approx(1, abs=1e-3)
    assert "of gradients 1.0e+00; not timed" in attention.report(result)


def test_far_keys_are_checked_by_their_definition():
    window = Window(16, 32, 5, 3, far_levels=10)
    result = bench_attention(
        Problem(window, 2, 16, torch.float32, CPU), ["tiled", "reference", "sdpa"], 1, True
    )
    tiled, reference, _ = result["rows"]
    assert result["correct"]
    assert result["far"]
    assert max(largest(errors_of(row)) for row in result["rows"]) < 1e-5
    assert [row["lse_error"] is None for row in result["rows"]] == [False, False, True]
    assert max(row["gradient_error"] for row in result["rows"]) < 1e-5
    assert 1 < tiled["executed_over_exact"] < reference["executed_over_exact"]
    assert ", far keys, " in attention.report(result)
    query, key, value = given = tensors(window)
    out = local_attention(query, key, value, window, impl="reference")
    assert error(out, given, window) < 1e-5
    # Without the log of the counts, or with another disc, it is wrong.
    assert error(out, given, dataclasses.replace(window, radius=4)) > 1e-2
    pooled = pooled_keys(key, value, window, None, query.shape[-1] ** -0.5)
    every = (torch.cat([x, more], 1) for x, more in zip((key, value), pooled, strict=True))
    assert error(masked(query, *every, window.mask()), given, window) > 1e-2


def test_nan_is_wrong():
    given = tensors()
    out = PEERS["sdpa"].run(*given, WINDOW)
    out[0, 2, 1] = float("nan")
    out[0, 0, 0] = 0
    assert not sampled_errors(out, given, WINDOW, sees_everything).right(torch.float32)
    out, lse = local_attention(*given, WINDOW, impl="reference", return_lse=True)
    lse[0, 2, 1] = float("nan")
    assert not sampled_errors(out, given, WINDOW, lse=lse).right(torch.float32)


def absolute_error(out, window, tensors):
    """The largest of all queries: one bound for it does not tell what is right."""
    query, key, value = (x.float() for x in tensors)
    exact = local_attention(query, key, value, window, impl="tiled")
    return float((out - exact).abs().max())


def test_text_rows_are_judged_by_their_own_size():
    """Over many keys they are small: where all are zero, they are off by a few hundredths."""
    window = Window(192, 200, 8, 2)
    given = tensors(window, torch.bfloat16)
    out, lse = local_attention(*given, window, impl="tiled", return_lse=True)
    right = sampled_errors(out, given, window, lse=lse)
    assert right.right(torch.bfloat16)
    assert max(right.text_error, right.image_error) < 5e-3
    out[:, :8] = 0
    assert absolute_error(out, window, given) < 3e-2
    wrong = sampled_errors(out, given, window, lse=lse)
    assert wrong.text_error == pytest.approx(1, abs=0.5)
    assert wrong.image_error == right.image_error
    assert not wrong.right(torch.bfloat16)


@slow
def test_one_missing_tile_of_keys_is_noticed():
    """64 of the 3700 keys that a query sees at r=32."""
    window = Window(72, 72, 512, 32)
    query, key, value = given = tensors(window)
    mask = window.mask()
    tile = torch.zeros(72, 72, dtype=torch.bool)
    tile[32:40, 32:40] = True
    mask[512:, 512:] &= ~tile.flatten()
    out = masked(query, key, value, mask)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    lse = scores.masked_fill_(~mask, float("-inf")).logsumexp(-1).transpose(1, 2)
    wrong = sampled_errors(out, given, window, lse=lse)
    assert wrong.text_error < 1e-5
    assert wrong.image_error > 5e-2
    assert wrong.lse_error > 1e-2
    for left_out in (wrong._replace(lse_error=None), wrong._replace(image_error=0.0)):
        assert not left_out.right(torch.bfloat16)


def test_executed_pairs_of_the_triton_kernels(monkeypatch):
    pytest.importorskip("triton")
    from clear_dit.bench.peers import triton_pairs
    from clear_dit.kernels.triton import tables, tuning

    window = Window(64, 64, 512, 8)
    query = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)
    text = window.text_length * window.sequence_length
    exact = exact_keys(window) * window.image_length + text
    assert exact == window.attended_pairs()
    default = triton_pairs(query, window)
    assert 1 < default / exact < 2
    far = dataclasses.replace(window, far_levels=10)
    assert 1 < triton_pairs(query, far) / far.attended_pairs() < 2
    monkeypatch.setenv(tuning.PIN, tables.FORWARD["sm_80"][1].name)
    assert triton_pairs(query, window) != default


def test_cuda_times_are_of_many_calls_in_a_row(monkeypatch):
    clock, calls = [0.0], {"short": 0, "long": 0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    def run(name, milliseconds):
        calls[name] += 1
        clock[0] += milliseconds

    def head_start(cycles):
        clock[0] += 100.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", head_start)
    runs = {"short": lambda: run("short", 0.5), "long": lambda: run("long", 2000)}
    seconds = time_in_turn(runs, 3, torch.device("cuda"))
    assert seconds == {"short": pytest.approx(5e-4), "long": pytest.approx(2)}
    assert calls == {"short": 1 + 3 * 20, "long": 1 + 3}
