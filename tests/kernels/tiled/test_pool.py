"""Far keys pooled by the compiled CPU kernel: against PyTorch's operators in float64."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from support.compiled import needs_compiler
from support.oracle import relative_error
from support.pooling import exact, problem
from support.slow import slow

from clear_dit.kernels import choice
from clear_dit.kernels.attention import local_attention
from clear_dit.kernels.pooling import pool_cells
from clear_dit.kernels.tiled.native import build, pool
from clear_dit.kernels.tiled.native.shares import by_threads
from clear_dit.kernels.window import Window

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned_memory")]

# (height, width, levels)
GRIDS = [(1, 1, 1), (1, 19, 3), (19, 1, 4), (5, 7, 2), (33, 17, 6), (3, 6, 10)]


def worst(arguments, scale=0.3):
    """Relative error of keys and values to float64's, the larger one."""
    found = pool.pool_cells(*arguments, scale)
    errors = []
    for ours, truth in zip(found, exact(arguments, scale), strict=True):
        assert (ours.dtype, ours.is_contiguous()) == (arguments[0].dtype, True)
        error = relative_error(ours, truth)
        errors.append(error if error == error else 1.0)
    return max(errors)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_cells_are_those_of_the_operators(grid, weighted):
    assert worst(problem(*grid, weighted)) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dim", [7, 16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype, dim):
    """Rounding at every level is off by 0.3 eps and more."""
    assert worst(problem(5, 9, 4, dtype=dtype, dim=dim)) <= 0.28 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_no_size_of_the_keys_overflows(scale):
    """What rounds off the exponents is a relative error of the shares."""
    arguments = problem(9, 9, 4)
    largest = abs(scale) * float(arguments[0].square().sum(-1).max())
    assert worst(arguments, scale) <= 2 * largest * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_heads_and_strides(threads):
    key, value, *others = problem(37, 5, 6, batch=2, heads=3)
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    value = torch.stack([value, value], dim=-1)[..., 0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert worst([key, value, *others]) <= 1e-6
    finally:
        torch.set_num_threads(before)


def test_local_attention_pools_by_it(monkeypatch):
    query, key = torch.randn(2, 1, 30, 1, 24)
    seen = []
    compiled = choice.pool_cells_compiled
    monkeypatch.setattr(choice, "pool_cells_compiled", lambda *a: seen.append(0) or compiled(*a))
    window = Window(6, 5, 0, 2, far_levels=2)
    local_attention(query, key, key, window)
    assert seen == [0]
    local_attention(*(x.double() for x in (query, key, key)), window)
    assert seen == [0]  # by PyTorch's operators


def test_bad_input_is_refused():
    key, value, weight, *sizes = problem(6, 5, 2)
    for wrong in (
        (key, value.half(), weight),
        (key, value[:, 1:], weight),
        (key, value, weight[1:]),
    ):
        with pytest.raises(ValueError, match=r"pool_cells: (value|weight) must be"):
            pool_cells(*wrong, *sizes, 0.3)


def test_an_error_of_any_thread_is_raised():
    def run(share):
        if share == 7:
            raise ValueError("seven")
        return share

    with pytest.raises(ValueError, match="seven"):
        by_threads(run, list(range(10)), 3)
    assert sorted(by_threads(run, list(range(7)), 3)) == list(range(7))


MUTANTS = {
    "a factor of the cell's left out": ("factor[i] *= mass[i] / total", "factor[i] /= total"),
    "weights of the level below forgotten": ("total += mass[i] *=", "total += mass[i] ="),
    "largest of the first child": ("*std::max_element(largest, largest + count)", "largest[0]"),
    "learned of the next child": ("p.learned[place]", "p.learned[count]"),
    "the square of the length halved": ("p.scale * length2", "p.scale / 2 * length2"),
    "values of the first head": ("(b, child[i], h)", "(b, child[i], 0)"),
    "rows from the last on": ("int64_t(row) * across", "int64_t(stop - 1 - row + first) * across"),
}


@slow
@pytest.mark.parametrize("fault", [None, *MUTANTS])
def test_a_fault_is_noticed(fault, tmp_path, monkeypatch):
    source = Path(pool.__file__).with_suffix(".cpp")
    text, (old, new) = source.read_text(), MUTANTS.get(fault, ("", ""))
    assert fault is None or text.count(old) == 1
    shutil.copy(source.with_name("numbers.h"), tmp_path)
    (tmp_path / "mutant.cpp").write_text(text.replace(old, new))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = build.load(tmp_path / "mutant.cpp", ["HEAD_DIM=24"])
    library.pool_share.restype, library.pool_share.argtypes = None, pool.ARGUMENTS
    assert isinstance(library, ctypes.CDLL)
    monkeypatch.setattr(pool, "_library", lambda head_dim: library)
    key, *others = problem(7, 6, 3, heads=2)
    # Then some keys far larger than the first: relative to that one the exponential overflows.
    long = key * torch.tensor([1.0, 20.0]).repeat(21)[:, None, None]
    errors = [worst([each, *others], 0.5) for each in (key, long)]
    if fault is None:
        assert errors[0] < 1e-6
        assert errors[1] < 1e-4
    else:
        assert errors[0] > 1e-5 or errors[1] > 1e-3
