"""Would the tests notice? Small faults put into the kernels' source must make results wrong.

Each fault is one replacement in a copy of `kernels/`; the copy runs the battery below. The first
test says that the battery passes on the unchanged source.
"""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.oracle import pool_by_definition, relative_error
from support.slow import slow_but
from support.triton_mode import interpreted

from clear_dit.kernels import window as original
from clear_dit.kernels.opaque import Geometry

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
    "gradients: queries over the rim": (
        "triton/backward.py",
        "delta, k, v, mask, None, scale_log2, MASKED",
        "delta, k, v, mask, None, scale_log2, False",
    ),
    "gradients: delta of the keys left out": (
        "triton/backward.py",
        "probability * (grad_probability - delta[None, :])",
        "probability * grad_probability",
    ),
    "gradients: last keys of a walk dropped": (
        "triton/backward.py",
        "for start in tl.range(full, end, N, num_stages=1):",
        "for start in tl.range(full, full, N, num_stages=1):",
    ),
    "gradients: last block of a walk over queries dropped": (
        "triton/backward.py",
        "for start in tl.range(begin, end, N, num_stages=STAGES):",
        "for start in tl.range(begin, end - N, N, num_stages=STAGES):",
    ),
}


# One of each file: the rest say the same of other lines.
QUICK = (
    "disc with its rim",
    "last tile of a list dropped",
    "one text key too many",
    "last split of the text queries dropped",
    "gradients: delta of the keys left out",
)


def battery(launch, tables, geometry, backward, part) -> Iterator[float]:
    """Relative errors of the forward or the backward pass, of a few small problems in turn."""
    config = tables.ForwardConfig(geometry.Tiling(4, 4, 4, 4), 16, 4, 1)
    run = tables.RunConfig(16, 16, 4, 1)
    tile = tables.TileConfig(config.tiling, 4, 1)
    gradients = tables.BackwardConfig(tile, tile, run, run)
    for height, width, text, radius, factor in ((5, 9, 5, 6, 3), (9, 6, 16, 5, 1)):
        window = original.Window(height, width, text, radius, factor)
        numbers = Geometry(height, width, text, radius, 0.25, 0, height)
        torch.manual_seed(0)
        # Values far from zero on average: a key more or less is then always seen.
        shape = (1, window.sequence_length, 2, 16)
        query, key, value = (torch.randn(shape, dtype=torch.float64) + 0.5 for _ in range(3))
        pooled_key, pooled_value = (pool(x, window) for x in (key, value))
        tensors = (query, key, value, pooled_key, pooled_value)
        truth = by_definition(tensors, window)
        tensors = [x.float() for x in tensors]
        out, lse = torch.full(shape, float("nan")), torch.full(shape[:3], float("nan"))
        if part == "forward":
            launch.image_attention(*tensors, torch.empty(0, 2), out, lse, numbers, config)
            launch.text_attention(*tensors[:3], out, lse, text, 0.25, run, 8)
            yield from map(error_of, (out, lse), truth)
            continue
        grads = backward.attention_backward(
            truth[0].float(), *tensors, torch.empty(0, 2), truth[0].float(), truth[1].float(),
            numbers, config=gradients, programs=8,
        )  # fmt: skip
        yield from map(error_of, grads[:5], truth[2:])


def error_of(found, exact) -> float:
    error = relative_error(found, exact) if exact.numel() else 0.0
    return error if error == error else float("inf")


def pool(tokens, window):
    """Pooled tokens; none without pooling."""
    if window.down_factor == 1:
        return tokens[:, :0]
    weight = torch.full((window.down_factor,) * 2, window.down_factor**-2.0, dtype=tokens.dtype)
    return pool_by_definition(tokens, window, weight)


def by_definition(tensors, window):
    """Output, log-sum-exp and the five gradients for a gradient that equals the output."""
    query, key, value, pooled_key, pooled_value = leaves = [x.requires_grad_() for x in tensors]
    scores = torch.einsum("bqhd,bkhd->bqhk", query, torch.cat([key, pooled_key], 1)) * 0.25
    mask = window.mask()[None, :, None, :]
    scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), torch.cat([value, pooled_value], 1))
    grads = torch.autograd.grad(out, leaves, out.detach())
    return [x.detach() for x in (out, scores.logsumexp(-1), *grads)]


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
        for module in ("launch", "tables", "geometry", "backward")
    ]
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    return modules


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_the_battery_passes_without_a_fault(part, tmp_path, monkeypatch):
    assert max(battery(*load(tmp_path, f"unchanged_{part}", monkeypatch), part)) < 1e-5


@pytest.mark.parametrize("fault", slow_but(MUTANTS, *QUICK))
def test_a_fault_is_noticed(fault, tmp_path, monkeypatch):
    name = "mutant_" + "".join(c if c.isalnum() else "_" for c in fault)
    part = "backward" if fault.startswith("gradients") else "forward"
    errors = battery(*load(tmp_path, name, monkeypatch, MUTANTS[fault]), part)
    assert any(error > 1e-3 for error in errors)
