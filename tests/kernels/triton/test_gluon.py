"""The Hopper kernel in Gluon, in an emulator, against the definition; and faults put into it."""

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from support.gluon_emulator import DeadlockError, FaultError, Kernel
from support.gluon_sass import compiled, under_way
from support.oracle import attention_by_definition, relative_error
from support.slow import slow, slow_but
from support.triton_mode import interpreted

from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.pooling import pooled_bias, pooled_keys
from clear_dit.kernels.reference import reference_attention
from clear_dit.kernels.window import Window

if not interpreted:
    pytest.skip("needs Triton", allow_module_level=True)

from clear_dit.kernels.triton import tables
from clear_dit.kernels.triton.gluon import kernel, launch, lists

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FEWEST_STAGES = lists.WIDEST_STEP + 1


def error(
    monkeypatch, window, rows=None, batch=1, heads=1, head_dim=64, scale=None, dtype=torch.float16,
    stages=FEWEST_STAGES, seed=0, faults=(), head_first=False, group=1,
):  # fmt: skip
    """Error of image queries' output in units of its tolerance, and relative of log-sum-exp.

    Tolerance: twice the error of a plain implementation in the same dtype, and two roundings.
    heads: of the keys, each of which a group of the queries' reads.
    """
    monkeypatch.setattr(launch, "image_forward", Kernel(kernel, "image_forward", seed, faults))
    scale = head_dim**-0.5 if scale is None else scale
    text, width = window.text_length, window.width
    start, stop = rows or (0, window.height)
    generator = torch.Generator().manual_seed(seed)
    key_heads, heads = heads, heads * group
    shape = (3, batch, window.sequence_length, heads, head_dim)
    q, k, v = torch.randn(shape, generator=generator).to(dtype)
    k, v = (x[:, :, :key_heads].contiguous() for x in (k, v))
    if head_first:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    kept = torch.cat([torch.arange(text), text + torch.arange(start * width, stop * width)])
    exact = [x.double() for x in (q, k, v)]
    # Pooled once, so that all see the same keys.
    pooled = pooled_keys(k.float(), v.float(), window, None, scale)
    pooled = [x.to(dtype) for x in pooled]
    bias = pooled_bias(window, heads, None, q.device)
    truth, truth_lse = (
        x[:, kept][:, text:]
        for x in reference_attention(
            *exact, window, scale=scale, pooled=[x.double() for x in pooled]
        )
    )
    plain = attention_by_definition(q, k, v, window, scale)[:, kept][:, text:]
    out = torch.empty(batch, len(kept), heads, head_dim, dtype=dtype)
    lse = torch.empty(batch, len(kept), heads)
    geometry = Geometry(window.height, width, text, window.disc_radius, scale, start, stop)
    launch.gluon_attention(
        q[:, kept], k, v, *pooled, bias, out, lse, geometry, tables.GluonConfig(stages),
    )  # fmt: skip
    assert out[:, :text].isnan().all(), "text queries are another kernel's"
    assert lse[:, :text].isnan().all()
    tolerance = 2 * relative_error(plain, truth) + 2 * torch.finfo(dtype).eps
    of_lse = (lse[:, text:].double() - truth_lse).abs() / (1 + truth_lse.abs())
    return relative_error(out[:, text:], truth) / tolerance, float(of_lse.max())


def check(*args, **kwargs):
    of_out, of_lse = error(*args, **kwargs)
    assert of_out <= 1
    assert of_lse <= 1e-5


SEVERAL = Window(17, 43, 70, 6)
CASES = {
    "several programs": dict(window=SEVERAL),
    "many heads": dict(window=Window(11, 19, 7, 4), batch=2, heads=2),
    "no text": dict(window=Window(9, 37, 0, 5)),
    "text of one block": dict(window=Window(9, 20, 64, 3)),
    "text of two blocks": dict(window=Window(9, 20, 128, 3)),
    "text of 65": dict(window=Window(9, 20, 65, 3)),
    "itself and the text": dict(window=Window(10, 18, 1, 1)),
    "radius 2": dict(window=Window(10, 34, 3, 2)),
    "radius 8": dict(window=Window(27, 51, 5, 8)),
    "radius 16: tiles seen whole": dict(window=Window(41, 50, 9, 16)),
    "past the diagonal": dict(window=Window(13, 30, 20, 40)),
    "one group": dict(window=Window(20, 8, 66, 5)),
    "one column of the second group": dict(window=Window(9, 25, 3, 9)),
    "less than a tile": dict(window=Window(3, 5, 70, 3), batch=3),
    "one token": dict(window=Window(1, 1, 0, 1)),
    "some rows": dict(window=Window(29, 21, 9, 7), rows=(5, 18)),
    "one row": dict(window=Window(29, 21, 9, 7), rows=(28, 29)),
    "a scale below zero": dict(window=SEVERAL, scale=-0.2),
    "a scale of zero": dict(window=SEVERAL, scale=0.0),
    "a large scale": dict(window=SEVERAL, scale=9.0),
    "128 channels": dict(window=Window(9, 20, 7, 4), head_dim=128),
    "40 channels": dict(window=Window(9, 20, 7, 4), head_dim=40),
    "96 channels, bfloat16": dict(window=Window(9, 20, 7, 4), head_dim=96, dtype=torch.bfloat16),
    "bfloat16": dict(window=SEVERAL, dtype=torch.bfloat16),
    "pooled": dict(window=Window(12, 22, 70, 4, 2), heads=2),
    "pooled without text": dict(window=Window(24, 37, 0, 4, 2)),
    "pooled with counts": dict(window=Window(23, 37, 7, 4, 2, pooled_weight="count"), heads=2),
    "counts without text": dict(
        window=Window(23, 37, 0, 4, 2, pooled_weight="count"), scale=-0.1, batch=2
    ),
    "grouped heads": dict(window=Window(11, 19, 7, 4, 2), heads=2, group=2),
    "heads before tokens": dict(window=Window(11, 19, 7, 4), heads=3, head_first=True),
}


# The rest say the same of other sizes.
QUICK = (
    "several programs",
    "no text",
    "one column of the second group",
    "some rows",
    "a scale below zero",
    "bfloat16",
    "pooled with counts",
    "grouped heads",
)


@pytest.mark.parametrize("name", slow_but(CASES, *QUICK))
def test_is_the_definition(name, monkeypatch):
    check(monkeypatch, **CASES[name], seed=1)


@pytest.mark.parametrize("stages", [FEWEST_STAGES, 4, 6])
@pytest.mark.parametrize("seed", slow_but(range(3), 0))
def test_is_the_definition_whoever_is_late(stages, seed, monkeypatch):
    check(monkeypatch, Window(12, 35, 130, 5), stages=stages, seed=seed)


@pytest.mark.parametrize("seed", slow_but(range(8), 0))
def test_random_problems(seed, monkeypatch):
    chance = random.Random(seed)
    height = chance.randrange(1, 25)
    start = chance.randrange(height)
    window = Window(
        height, chance.randrange(1, 50), chance.choice((0, 1, 63, 64, 100)), chance.randrange(1, 14)
    )
    check(
        monkeypatch, window, rows=(start, chance.randrange(start, height) + 1),
        scale=chance.uniform(-1, 1), stages=chance.randrange(FEWEST_STAGES, 7), seed=seed,
    )  # fmt: skip


# What is replaced, by what. Each must give wrong numbers, or be refused by the emulator.
FAULTS = {
    "a tile passed over is not given back": (
        "    mbarrier.wait(full.index(stage), at // STAGES & 1)\n"
        "    mbarrier.arrive(empty.index(stage), count=1)\n",
        "    mbarrier.wait(full.index(stage), at // STAGES & 1)\n",
    ),
    "a tile passed over is not waited for": (
        "    mbarrier.wait(full.index(stage), at // STAGES & 1)\n"
        "    mbarrier.arrive(empty.index(stage), count=1)\n",
        "    mbarrier.arrive(empty.index(stage), count=1)\n",
    ),
    "no tile between is passed over": ("following > at + 1", "following > at + 2"),
    "the last tiles are not passed over": ("range(at + 1, total)", "range(total, total)"),
    "loads wait by the other parity": ("& 1 ^ 1)", "& 1)"),
    "tiles are waited for by the other parity": (
        "mbarrier.wait(full.index(ahead), following // STAGES & 1)",
        "mbarrier.wait(full.index(ahead), following // STAGES & 1 ^ 1)",
    ),
    "the first tile is not waited for": (
        "mbarrier.wait(full.index(at % STAGES), at // STAGES & 1)", "",
    ),
    "a stage is given back before its values are summed": (
        "    scores, acc, _ = warpgroup_mma_wait(0, [ahead_scores, acc, weights])\n"
        "    mbarrier.arrive(empty.index(stage), count=1)\n",
        "    mbarrier.arrive(empty.index(stage), count=1)\n"
        "    scores, acc, _ = warpgroup_mma_wait(0, [ahead_scores, acc, weights])\n",
    ),
    "the last stage is not given back": (
        "        mbarrier.arrive(empty.index(at % STAGES), count=1)\n", "",
    ),
    "scores are read before they are there": (
        "warpgroup_mma_wait(0, [ahead_scores, acc, weights])",
        "warpgroup_mma_wait(2, [ahead_scores, acc, weights])",
    ),
    "a sum is read before it is there": (
        "warpgroup_mma_wait(0, [ahead_scores, acc, weights])",
        "warpgroup_mma_wait(1, [ahead_scores, acc, weights])",
    ),
    "scores of the first tile are read before they are there": (
        "warpgroup_mma_wait(0, [score(", "warpgroup_mma_wait(1, [score(",
    ),
    "more bytes are expected than come": ("4 * TOKENS * D", "4 * TOKENS * D + 16"),
    "fewer bytes are expected than come": ("4 * TOKENS * D", "2 * TOKENS * D"),
    "one group empties a stage": ("empty.index(stage), count=2", "empty.index(stage), count=1"),
    "queries without a fence": ("fence_async_shared()\n        partition", "partition"),
    "queries without a barrier": (
        "        fence_async_shared()\n        partition_barrier()\n",
        "        fence_async_shared()\n",
    ),
    "output without a barrier": (
        "buffer.store(acc.to(q.dtype))\n        partition_barrier()\n",
        "buffer.store(acc.to(q.dtype))\n",
    ),
    "lists of the other group": ("gl.load(entry + 2)", "gl.load(entry + 4)"),
    "a group's last tile dropped": ("range(begin, end)", "range(begin, end - 1)"),
    "values of the next tile": ("values.index(stage), rescale", "values.index(ahead), rescale"),
    "the disc with its rim": ("dx * dx < radius2", "dx * dx <= radius2"),
    "no disc": ("hidden_by & DISC", "hidden_by & 4"),
    "no border": ("hidden_by & BORDER", "hidden_by & 4"),
    "no right border": ("column + x < width", "column + x < 2 * width"),
    "no lower border": (" & (row + y < height)", ""),
    "no upper border": ("(row + y >= 0) & ", ""),
    "keys behind the text": ("(token < keys_of_first(blocks, length))", "(token < TOKENS)"),
    "no bias": ("scores + added[None, :]", "scores"),
    "a bias in log2": ("(LOG2_E / scale_log2)", "(1 / scale_log2)"),
    "the bias is not of raw scores": ("(LOG2_E / scale_log2)", "LOG2_E"),
    "the bias of another key": ("length) + token", "length) + token * 0"),
    "pooled keys are text": ("(\n                pooled_key", "(\n                text_key"),
    "text one token late": ("(blocks - block) * TOKENS, 0)", "(blocks - block) * TOKENS + 1, 0)"),
    "key heads in turns": ("head // GROUP, tile_y", "head % (heads // GROUP), tile_y"),
    "queries of the first group": ("tile_x + SIDE * GROUP + row", "tile_x + row"),
    "the sum is not rescaled": ("(stage), rescale(acc, factor)", "(stage), acc"),
    "the sum of a row is not rescaled": ("= rescale(row_sums, factor)", "= row_sums"),
    "the sign of the scale": ("(q * sign)", "(q)"),
    "log-sum-exp in log2": ("gl.log2(row_sum)) * LN_2", "gl.log2(row_sum))"),
    "log-sum-exp of raw scores": ("(row_max * scale_log2 + gl", "(row_max + gl"),
    "another head's rows": ("lse += row", "lse += row + 1"),
    "queries beyond the last row are stored": ("own_y < query_stop", "own_y < query_stop + 1"),
}  # fmt: skip


def is_noticed(monkeypatch, **kwargs):
    """By one of a few problems and orders of events."""
    windows = (
        # A tile that begins above the image, and one over each other border.
        dict(window=Window(9, 20, 70, 6), rows=(4, 9), heads=2, group=2, scale=-0.3),
        # Four tiles that only one group sees, after the other's last.
        dict(window=Window(27, 27, 0, 10), rows=(8, 16), scale=0.7),
        # Tiles that only one group sees, in turns.
        dict(window=Window(24, 48, 0, 9), rows=(8, 16)),
        dict(window=Window(17, 18, 70, 4, 2, pooled_weight="count"), scale=0.3),
    )
    for seed in range(4):
        for window in windows:
            try:
                of_out, of_lse = error(monkeypatch, **window, seed=seed, **kwargs)
            except (DeadlockError, FaultError, AssertionError):
                return True
            # NaN is no number below 1.
            if not (of_out <= 1 and of_lse <= 1e-5):
                return True
    return False


@slow
def test_nothing_is_noticed_without_a_fault(monkeypatch):
    assert not is_noticed(monkeypatch)


@slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(name, monkeypatch):
    assert is_noticed(monkeypatch, faults=(FAULTS[name],))


def test_tiles_of_one_group_must_take_turns(monkeypatch):
    monkeypatch.setattr(
        lists, "_order", lambda seen: (seen * (2, 1)).sum(axis=1).argsort(kind="stable")
    )

    def made_anew(height, width, radius, device, owner_rows):
        return lists._paired_visits(height, width, radius, owner_rows)

    monkeypatch.setattr(launch, "paired_visits", made_anew)
    with pytest.raises(DeadlockError):
        check(monkeypatch, Window(17, 43, 70, 9))


@slow
@pytest.mark.parametrize(("head_dim", "pooled"), [(64, 0), (128, 0), (128, 70)])
def test_compiled_softmax_stands_between_products(head_dim, pooled, monkeypatch, tmp_path):
    # Triton decides at its import whether it interprets: a process of its own.
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        usage, instructions = pool.submit(compiled, head_dim, pooled, tmp_path).result()
    assert usage["stack"] == usage["loop_spills"] == 0
    assert usage["shared"] <= tables.SHARED_MEMORY["sm_90"]
    assert usage["wgmma"]
    assert any(name.startswith("USETMAXREG") for name in instructions)
    # Of a step: products for 64 scores a query, and with 64 values. A thread has 32 probabilities.
    steps = [run for run in under_way(instructions) if run[0] == head_dim // 16 + 4]
    # Each group's: text by twos, one more, tiles, and pooled keys.
    assert len(steps) == 2 * (4 + (pooled > 0))
    assert all(exponentials >= 32 for _, exponentials in steps)
