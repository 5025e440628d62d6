"""Would the tests notice? Small faults put into the compiled kernel must make results wrong.

None of them reads or writes beyond its memory.
"""

import ctypes
import math
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.agreement import FAR
from support.compiled import needs_compiler
from support.oracle import relative_error, repeated
from support.slow import slow, slow_but

from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.tiled.native import build, forward
from clear_dit.kernels.window import Window

pytestmark = needs_compiler
SOURCE = Path(forward.__file__).with_suffix(".cpp")
MUTANTS = {
    "disc with its rim": ("sqrt(room - 1)", "sqrt(room)"),
    "window one column to the right": ("place[lane] = 2 * lane_x", "place[lane] = 2 * lane_x + 2"),
    "window one row down": ("2 * std::min(y + i, last_y)", "2 * std::min(y + i, last_y) + 2"),
    "a column too few": ("<= 2 * last_x + most_outer", "< 2 * last_x + most_outer - 1"),
    "last row of keys left out": ("at < end; ++at", "at < end - 1; ++at"),
    "rows of keys in each other's place": ("TILE_ROWS + 2 * p.radius)", "2 * p.radius - 2)"),
    "text keys left out": ("p.text_length);\n      if", "0);\n      if"),
    "pooled keys without their bias": ("score + levels[0].bias[i * step] * LOG2_E", "score"),
    "far keys without their bias": (" + row.bias[(from + i) * step] * LOG2_E", ""),
    "bias to the base e": ("row.bias[(from + i) * step] * LOG2_E", "row.bias[(from + i) * step]"),
    "bias of a run's first cell": ("row.bias[(from + i) * step]", "row.bias[from * step]"),
    "a level left out": (
        "if (!row.seen(p.width)) continue;",
        "if (!row.seen(p.width) || level.number == 2) continue;",
    ),
    "keys of the level below": ("if (number) cells +=", "if (number == 1) cells +="),
    "far cells seen from within": ("near & ~into ?", "near ?"),
    "far cells seen from everywhere": ("near & ~into ?", "~into ?"),
    "the hole a column wider": (
        "see_cells(row.hole_stop, row.stop)",
        "see_cells(row.hole_stop + 1, row.stop)",
    ),
    "a centre off by one": ("length) - 1;\n", "length);\n"),
    "partial cells taken for whole": (
        "std::min(first + (1 << level), length)",
        "(first + (1 << level))",
    ),
    "the reach of the level below": (
        "reach2(p.radius, ++outer_level)",
        "reach2(p.radius, outer_level++)",
    ),
    "rows from the last to the first": (
        "int64_t(at - start) * level.columns",
        "int64_t(end - 1 - at) * level.columns",
    ),
    "text queries without the last keys": ("some = std::min(CHUNK, length - start)", "some = 1"),
    "text queries without a lane": (
        "first + i * LANES + lane, stop - 1",
        "first + i * LANES, stop - 1",
    ),
    "a chunk's sum not rescaled": ("sum *= factor;", ""),
    "a chunk's output not rescaled": ("(out[d + I] * factor)", "out[d + I]"),
    "the last channels left out": ("if constexpr (REST > 0)", "if constexpr (REST > 8)"),
    "log-sum-exp to the base 2": ("* LN_2;\n    }", ";\n    }"),
    "a term of the exponential left out": ("+ 1.0f / 120;", ";"),
    "values of another head": (
        "(p.value, b, p.text_length + cell, key_head,",
        "(p.value, b, p.text_length + cell, 0,",
    ),
    "text queries of a group read other keys": (
        "key_head = h / p.group;\n  float",
        "key_head = h % p.group;\n  float",
    ),
    "image queries of a group read other keys": (
        "bias.token, key_head = h / p.group",
        "bias.token, key_head = h % p.group",
    ),
    "the bias of a key head": (
        "level.bias = p.bias.at<float>(0, cells, h)",
        "level.bias = p.bias.at<float>(0, cells, key_head)",
    ),
    "rows of a tile taken for one": (
        "side(of.outer2, query - around)",
        "side(of.outer2, 2 * y - around)",
    ),
}
EXACT = 1e-6
PROBLEMS = (
    Window(13, 22, 140, 5),
    Window(20, 7, 0, 3, query_rows=(5, 10)),
    Window(13, 9, 2, 3, 2, pooled_weight="count"),
    FAR,
    replace(FAR, query_rows=(6, 17), key_rows=((2, 19), (1, 10), (0, 6), (1, 3), (0, 2)), radius=5),
)


def battery(library: ctypes.CDLL, monkeypatch) -> float:
    """Largest relative error of output and log-sum-exp over a few small problems."""
    monkeypatch.setattr(forward, "_library", lambda head_dim: library)
    worst = 0.0
    for window in PROBLEMS:
        torch.manual_seed(0)
        # Values far from zero on average: a key more or less is then always seen.
        pooled = window.pooled_length
        key, value = torch.randn(2, 1, window.key_length + pooled, 2, 20) + 0.5
        query = torch.randn(1, window.query_length, 4, 20) + 0.5
        bias = torch.randn(pooled, 4)
        out, lse = torch.full_like(query, 9.0), torch.full(query.shape[:-1], 9.0)
        (own_key, pooled_key), (own_value, pooled_value) = (
            x.split((window.key_length, pooled), dim=1) for x in (key, value)
        )
        forward.attend_compiled(
            query, own_key, own_value, pooled_key, pooled_value, bias, out, lse,
            Geometry.of(window, 0.5),
        )  # fmt: skip
        key, value = (repeated(x, 2).double() for x in (key, value))
        scores = torch.einsum("bqhd,bkhd->bqhk", query.double(), key) * 0.5
        scores += F.pad(bias.T, (window.key_length, 0))
        scores = scores.masked_fill(~window.mask()[None, :, None], float("-inf"))
        exact = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), value)
        errors = relative_error(out, exact), relative_error(lse, scores.logsumexp(-1))
        worst = max(worst, *(error if error == error else 1.0 for error in errors))
    return worst


@pytest.fixture
def compile_mutant(tmp_path, monkeypatch):
    """A function of what to replace by what: the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["-O1" if flag == "-O3" else flag for flag in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", flags)

    def compile_(old: str = "", new: str = "") -> ctypes.CDLL:
        text = SOURCE.read_text()
        assert not old or text.count(old) == 1, f"{SOURCE.name} has {text.count(old)} of {old!r}"
        shutil.copy(SOURCE.with_name("numbers.h"), tmp_path)
        path = tmp_path / "mutant.cpp"
        path.write_text(text.replace(old, new) if old else text)
        library = build.load(path, ["HEAD_DIM=20"])
        library.attend_share.restype = ctypes.c_int64
        library.attend_share.argtypes = forward.ARGUMENTS
        return library

    return compile_


@slow
def test_the_battery_passes_without_a_fault(compile_mutant, monkeypatch):
    assert battery(compile_mutant(), monkeypatch) < EXACT


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize(("flag", "lanes"), slow_but([("-mno-avx512f", 8), ("-mno-avx", 4)]))
def test_smaller_vectors(flag, lanes, compile_mutant, monkeypatch):
    """As on older CPUs, and on others."""
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, flag])
    library = compile_mutant()
    assert math.prod(forward._tile(library)) <= lanes
    assert battery(library, monkeypatch) < EXACT


@pytest.mark.parametrize("fault", slow_but(MUTANTS, "disc with its rim"))
def test_a_fault_is_noticed(fault, compile_mutant, monkeypatch):
    assert battery(compile_mutant(*MUTANTS[fault]), monkeypatch) > 2 * EXACT
