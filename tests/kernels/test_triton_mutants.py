"""Would the tests notice? Small faults put into the kernels' source must make results wrong.

Each fault is one replacement in a copy of `kernels/`; the copy runs the battery below. The first
test says that the battery passes on the unchanged source.
"""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.oracle import attention_by_definition, pool_by_definition, relative_error
from support.triton_mode import interpreted

from clear_dit.kernels import window as original

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

# What numpy says of the nonsense that faults make.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SOURCE = Path(original.__file__).parent
MUTANTS = {
    "disc with its rim": (
        "triton/primitives.py",
        "dx2[:, None, :] < room[:, :, None]",
        "dx2[:, None, :] <= room[:, :, None]",
    ),
    "window one column to the right": (
        "triton/primitives.py",
        "visited_x = x + tl.arange(0, C)",
        "visited_x = x + 1 + tl.arange(0, C)",
    ),
    "window one row down": (
        "triton/primitives.py",
        "visited_y = y + tl.arange(0, R)",
        "visited_y = y + 1 + tl.arange(0, R)",
    ),
    "keys beyond the right border": (
        "triton/primitives.py",
        "real_x = (visited_x >= 0) & (visited_x < width)",
        "real_x = visited_x >= 0",
    ),
    "keys beyond the lower border": (
        "triton/primitives.py",
        "real_y = (visited_y >= 0) & (visited_y < height)",
        "real_y = visited_y >= 0",
    ),
    "keys beyond the upper border": (
        "triton/primitives.py",
        "real_y = (visited_y >= 0) & (visited_y < height)",
        "real_y = visited_y < height",
    ),
    "last tile of a list dropped": (
        "triton/geometry.py",
        "ranges[i, j] = begin, begin + inner.sum(), begin + len(offsets)",
        "ranges[i, j] = begin, begin + inner.sum(), begin + len(offsets) - 1",
    ),
    "first tile of a list dropped": (
        "triton/geometry.py",
        "ranges[i, j] = begin, begin + inner.sum(), begin + len(offsets)",
        "ranges[i, j] = begin + 1, begin + max(1, inner.sum()), begin + len(offsets)",
    ),
    "tiles of the rim without a mask": (
        "triton/geometry.py",
        "return inside & (far < radius**2)",
        "return inside & (far < (radius + 2) ** 2)",
    ),
    "last text keys dropped": (
        "triton/forward.py",
        "for start in tl.range(full, end, N, num_stages=1):",
        "for start in tl.range(full, full, N, num_stages=1):",
    ),
    "one text key too many": (
        "triton/forward.py",
        "valid = start + lane < end",
        "valid = start + lane <= end",
    ),
    "sums not rescaled": (
        "triton/primitives.py",
        "row_sum * factor + tl.sum(probability, 1)",
        "row_sum + tl.sum(probability, 1)",
    ),
    "output not rescaled": (
        "triton/forward.py",
        "acc = acc * factor[:, None]\n    acc = tl.dot",
        "acc = tl.dot",
    ),
    "log-sum-exp in base 2": ("triton/forward.py", "tl.log2(row_sum)) * LN_2", "tl.log2(row_sum))"),
    "last split of the text queries dropped": (
        "triton/dense.py",
        "for _ in range(splits):",
        "for _ in range(splits - 1):",
    ),
    "pooled keys of another head": (
        "triton/forward.py",
        "plane_start = (wide_batch * pooled_length * heads + head) * head_dim",
        "plane_start = wide_batch * pooled_length * heads * head_dim",
    ),
}


def battery(launch, tables, geometry, backward=None) -> float:
    """Largest relative error of a few small problems."""
    worst = 0.0
    config = tables.ForwardConfig(geometry.Tiling(4, 4, 4, 4), 16, 4, 1)
    text_config = tables.RunConfig(16, 16, 4, 1)
    for height, width, text, radius, factor in ((5, 9, 5, 6, 3), (9, 6, 16, 5, 1)):
        window = original.Window(height, width, text, radius, factor)
        torch.manual_seed(0)
        # Values far from zero on average: a key more or less is then always seen.
        shape = (1, window.sequence_length, 2, 16)
        query, key, value = (torch.randn(shape, dtype=torch.float64) + 0.5 for _ in range(3))
        exact, exact_lse, pooled = by_definition(query, key, value, window)
        out, lse = torch.full(shape, float("nan")), torch.full(shape[:3], float("nan"))
        query, key, value, pooled_key, pooled_value = (
            x.float() for x in (query, key, value, *pooled)
        )
        launch.image_attention(
            query, key, value, pooled_key, pooled_value, out, lse,
            height, width, text, radius, 0.25, config,
        )  # fmt: skip
        launch.text_attention(query, key, value, out, lse, text, 0.25, text_config, 8)
        for found, truth in ((out, exact), (lse, exact_lse)):
            error = relative_error(found, truth)
            worst = max(worst, error if error == error else float("inf"))
    return worst


def by_definition(query, key, value, window):
    """Output, log-sum-exp, and pooled key and value, in float64."""
    out = attention_by_definition(query, key, value, window, 0.25)
    empty = key[:, :0]
    pooled = (empty, empty)
    keys = key
    if window.down_factor > 1:
        weight = torch.full((window.down_factor,) * 2, window.down_factor**-2.0).double()
        pooled = tuple(pool_by_definition(x, window, weight) for x in (key, value))
        keys = torch.cat([key, pooled[0]], dim=1)
    scores = torch.einsum("bqhd,bkhd->bqhk", query, keys) * 0.25
    mask = window.mask()[None, :, None, :]
    lse = scores.masked_fill(~mask, float("-inf")).logsumexp(-1)
    return out, lse, pooled


def load(tmp_path: Path, name: str, monkeypatch, mutant=None):
    """A copy of the kernels, with one replacement, as a package called `name`."""
    folder = tmp_path / name
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        file, old, new = mutant
        text = (folder / file).read_text()
        assert text.count(old) >= 1, f"{file} no longer contains {old!r}"
        (folder / file).write_text(text.replace(old, new))
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = [
        importlib.import_module(f"{name}.triton.{module}")
        for module in ("launch", "tables", "geometry")
    ]
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    return modules


def test_the_battery_passes_without_a_fault(tmp_path, monkeypatch):
    assert battery(*load(tmp_path, "unchanged", monkeypatch)) < 1e-5


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_fault_is_noticed(fault, tmp_path, monkeypatch):
    name = "mutant_" + "".join(c if c.isalnum() else "_" for c in fault)
    assert battery(*load(tmp_path, name, monkeypatch, MUTANTS[fault])) > 1e-3
