"""Would the tests notice? Small faults put into the compiled kernel must make results wrong.

None of them reads or writes beyond its memory.
"""

import ctypes
import math
import platform
from pathlib import Path

import pytest
import torch
from support.compiled import needs_compiler
from support.oracle import relative_error
from support.slow import slow_but

from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.tiled.native import build, forward
from clear_dit.kernels.window import Window

pytestmark = needs_compiler
SOURCE = Path(forward.__file__).with_suffix(".cpp")
MUTANTS = {
    "disc with its rim": ("dx * dx < room", "dx * dx <= room"),
    "window one column to the right": ("x - float(column++)", "x - float(++column)"),
    "window one row down": ("tile.y - float(key_y)", "tile.y + 1 - float(key_y)"),
    "a column too few": ("last = std::min(last_x + half", "last = std::min(last_x + half - 1"),
    "last row of keys left out": ("key_y <= last_key_y", "key_y < last_key_y"),
    "rows of keys in each other's place": ("TILE_ROWS + 2 * reach)", "2 * reach)"),
    "dense keys left out": ("p.dense_length);\n", "0);\n"),
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
    "values of another head": ("(p.value, b, token, h,", "(p.value, b, token, 0,"),
    "rows of a tile taken for one": ("tile.y[lane] = lane_y", "tile.y[lane] = y"),
}
EXACT = 1e-6
PROBLEMS = (Window(13, 22, 140, 5), Window(20, 7, 0, 3, query_rows=(5, 10)))


def battery(library: ctypes.CDLL, monkeypatch) -> float:
    """Largest relative error of output and log-sum-exp over two small problems."""
    monkeypatch.setattr(forward, "_library", lambda head_dim: library)
    worst = 0.0
    for window in PROBLEMS:
        torch.manual_seed(0)
        # Values far from zero on average: a key more or less is then always seen.
        key, value = torch.randn(2, 1, window.sequence_length, 2, 20) + 0.5
        text = window.text_length
        query = torch.randn(1, window.query_length, 2, 20) + 0.5
        out, lse = torch.full_like(query, 9.0), torch.full(query.shape[:-1], 9.0)
        forward.attend_compiled(
            query, key, value, key[:, :text], value[:, :text], out, lse,
            Geometry.of(window, 0.5)._replace(radius=window.radius),
        )  # fmt: skip
        scores = torch.einsum("bqhd,bkhd->bqhk", query.double(), key.double()) * 0.5
        scores = scores.masked_fill(~window.mask()[None, :, None], float("-inf"))
        exact = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), value.double())
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
        path = tmp_path / "mutant.cpp"
        path.write_text(text.replace(old, new) if old else text)
        library = build.load(path, ["HEAD_DIM=20"])
        library.attend_share.restype = ctypes.c_int64
        library.attend_share.argtypes = forward.ARGUMENTS
        return library

    return compile_


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


@pytest.mark.parametrize(
    "fault", slow_but(MUTANTS, "disc with its rim", "last row of keys left out")
)
def test_a_fault_is_noticed(fault, compile_mutant, monkeypatch):
    assert battery(compile_mutant(*MUTANTS[fault]), monkeypatch) > 2 * EXACT
