"""Would the tests notice? Small faults put into the kernels' source must make results wrong.

Each fault is one replacement in a copy of `kernels/`; the copy runs the battery below. The first
test says that the battery passes on the unchanged source.
"""

import gc
import importlib
import re
import shutil
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.oracle import (
    far_means_by_definition,
    pool_by_definition,
    relative_error,
    repeated,
)
from support.slow import slow_but
from support.triton_mode import interpreted

from clear_dit.kernels import window as original
from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.pooling import pooled_bias

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

# What numpy says of the nonsense that faults make.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SOURCE = Path(original.__file__).parent
MUTANTS = {
    "disc with its rim": (
        "triton/primitives.py",
        "(dx * dx)[:, None, :] < room[:, :, None]",
        "(dx * dx)[:, None, :] <= room[:, :, None]",
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
        "tl.where((visited_x >= 0) & (visited_x < width), visited_x, -radius)",
        "tl.where(visited_x >= 0, visited_x, -radius)",
    ),
    "keys beyond the lower border": (
        "triton/primitives.py",
        "tl.where((visited_y >= 0) & (visited_y < height), visited_y, -radius)",
        "tl.where(visited_y >= 0, visited_y, -radius)",
    ),
    "keys beyond the upper border": (
        "triton/primitives.py",
        "tl.where((visited_y >= 0) & (visited_y < height), visited_y, -radius)",
        "tl.where(visited_y < height, visited_y, -radius)",
    ),
    "what lies beyond the border is near": (
        "triton/primitives.py",
        "(visited_y < height), visited_y, -radius)",
        "(visited_y < height), visited_y, 1 - radius)",
    ),
    "last tile of a list dropped": (
        "triton/geometry.py",
        "ranges[i, j] = begin, begin + inner.sum(), begin + len(found)",
        "ranges[i, j] = begin, begin + inner.sum(), begin + len(found) - 1",
    ),
    "first tile of a list dropped": (
        "triton/geometry.py",
        "ranges[i, j] = begin, begin + inner.sum(), begin + len(found)",
        "ranges[i, j] = begin + 1, begin + max(1, inner.sum()), begin + len(found)",
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
    "log-sum-exp in base 2": (
        "triton/primitives.py",
        "tl.log2(row_sum)) * LN_2",
        "tl.log2(row_sum))",
    ),
    "scores not scaled": (
        "triton/primitives.py",
        "tl.exp2(scores * scale_log2 - new_max[:, None])",
        "tl.exp2(scores - new_max[:, None])",
    ),
    "text rows zeroed": (
        "triton/dense.py",
        "target, valid, acc / row_sum[:, None], head_dim",
        "target, valid, acc * 0.0, head_dim",
    ),
    "wide: one tile of a radius of 32 dropped": (
        "triton/geometry.py",
        "ranges[i, j] = begin, begin + inner.sum(), begin + len(found)",
        "ranges[i, j] = begin, begin + inner.sum(), begin + len(found) - 1",
    ),
    "last split of the text queries dropped": (
        "triton/dense.py",
        "for _ in range(splits):",
        "for _ in range(splits - 1):",
    ),
    "pooled keys of another head": (
        "triton/forward.py",
        "plane_start = (wide_batch * pooled_length * key_heads + own_key_head) * head_dim",
        "plane_start = wide_batch * pooled_length * key_heads * head_dim",
    ),
    "far: a level dropped": (
        "triton/cell_lists.py",
        "order = [*range(1, levels + 1), 0]",
        "order = [1, *range(3, levels + 1), 0]",
    ),
    "far: tokens near by dropped": (
        "triton/cell_lists.py",
        "order = [*range(1, levels + 1), 0]",
        "order = [*range(1, levels + 1)]",
    ),
    "far: counts of the cells before": (
        "triton/far.py",
        "bias_stride, key - token_keys, key >= token_keys, True)",
        "bias_stride, key - token_keys - 1, key > token_keys, True)",
    ),
    "far: cells overlap what is nearer": (
        "triton/far.py",
        "return inner & (outer == 0)",
        "return outer == 0",
    ),
    "far: cells overlap what is farther": (
        "triton/far.py",
        "return inner & (outer == 0)",
        "return inner",
    ),
    "far: the rim of the reach is nearer": (
        "triton/far.py",
        "return crossed >= room[None, :]",
        "return crossed > room[None, :]",
    ),
    "far: one key too many": (
        "triton/far.py",
        "listed = step + lane < end",
        "listed = step + lane <= end",
    ),
    "far: what some see without a mask": (
        "triton/cell_lists.py",
        'every = (both("outer_far") < outer2) & (both("inner_near") >= inner2)',
        "every = some",
    ),
    "gradients far: cells overlap what is nearer": (
        "triton/far_backward.py",
        "within & (inside == 0), scale_log2",
        "within, scale_log2",
    ),
    "gradients far: cells beyond the reach": (
        "triton/far_backward.py",
        "within & (inside == 0), scale_log2",
        "inside == 0, scale_log2",
    ),
    "gradients far: last split of a walk dropped": (
        "triton/far_backward.py",
        "end = tl.minimum(begin + tiles_per_split, tl.load(ranges + tile + 1))",
        "end = tl.minimum(begin + tiles_per_split, tl.load(ranges + tile + 1) - 1)",
    ),
    "gradients far: text sees the tokens in every split": (
        "triton/far_backward.py",
        "tl.where(split == 0, text_length, 0)",
        "text_length",
    ),
    "gradients far: biases of another head": (
        "triton/far_backward.py",
        "b = load_bias(bias + head * bias_head, bias_token, cells, valid, BIAS)",
        "b = load_bias(bias, bias_token, cells, valid, BIAS)",
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
    "groups: image queries read the key heads in turns": (
        "triton/forward.py",
        "heads // GROUP, head // GROUP",
        "heads // GROUP, head % (heads // GROUP)",
    ),
    "groups: text queries read the key heads in turns": (
        "triton/dense.py",
        "own_key_head = place // GROUP",
        "own_key_head = place % (heads // GROUP)",
    ),
    "groups far: image queries read the key heads in turns": (
        "triton/far.py",
        "heads // GROUP, head // GROUP",
        "heads // GROUP, head % (heads // GROUP)",
    ),
    "gradients groups: image queries read the key heads in turns": (
        "triton/backward.py",
        "heads // GROUP, head // GROUP",
        "heads // GROUP, head % (heads // GROUP)",
    ),
    "gradients groups: text queries read the key heads in turns": (
        "triton/backward.py",
        "own_key_head = head // GROUP",
        "own_key_head = head % (heads // GROUP)",
    ),
    "gradients groups: heads of other keys": (
        "triton/backward.py",
        "head = own_key_head * GROUP + member",
        "head = own_key_head + member * key_heads",
    ),
    "gradients groups: log-sum-exp of the first of a group": (
        "triton/backward.py",
        "row = (plane.to(tl.int64) * GROUP + member) * sequence",
        "row = plane.to(tl.int64) * GROUP * sequence",
    ),
    "gradients groups: the last of a group left out": (
        "triton/backward.py",
        "for member in range(GROUP):",
        "for member in range(GROUP - 1):",
    ),
    "gradients groups far: image queries read the key heads in turns": (
        "triton/far_backward.py",
        "heads // GROUP, head // GROUP",
        "heads // GROUP, head % (heads // GROUP)",
    ),
    "gradients groups far: heads of other keys": (
        "triton/far_backward.py",
        "head = own_key_head * GROUP + member",
        "head = own_key_head + member * key_heads",
    ),
    "gradients groups far: the last of a group left out": (
        "triton/far_backward.py",
        "for member in range(GROUP):",
        "for member in range(GROUP - 1):",
    ),
    "replay: lists that a graph reads are freed": (
        "triton/resident.py",
        "            if in_capture:\n                self._replayed",
        "            if False:\n                self._replayed",
    ),
    "replay: lists are made while a graph is captured": (
        "triton/resident.py",
        "            if in_capture:\n                raise",
        "            if False:\n                raise",
    ),
    "pooling: tokens beyond the border": (
        "triton/pooling.py",
        "largest = tl.where(inside, scale * tl.sum(k * k, 1), LOWEST)",
        "largest = scale * tl.sum(k * k, 1)",
    ),
    "pooling: what tokens of a cell weigh is not passed on": (
        "triton/pooling.py",
        "masses = tl.reshape(mass, [4, N]) * tl.exp(of_places - largest[None, :])",
        "masses = tl.reshape(mass, [4, N])",
    ),
    "pooling: children in rows first": (
        "triton/pooling.py",
        "even_bits_reversed(index >> 1, BITS)",
        "even_bits_reversed(index >> 2, BITS)",
    ),
    "pooling: weights of the level below": (
        "triton/pooling.py",
        "own = tl.minimum(level + step, levels) - 1",
        "own = tl.minimum(level + step - 1, levels) - 1",
    ),
    "pooling: cells beyond the border": (
        "triton/pooling.py",
        "largest = tl.load(below_largest + at, mask=inside, other=LOWEST)",
        "largest = tl.load(below_largest + at, mask=inside, other=0.0)",
    ),
    "pooling: masses of a launch not passed on": (
        "triton/pooling.py",
        "tl.store(top_mass + at, mass)",
        "tl.store(top_mass + at, mass * 0.0 + 1.0)",
    ),
}


# One of each file: the rest say the same of other lines.
QUICK = (
    "disc with its rim",
    "pooling: what tokens of a cell weigh is not passed on",
    "replay: lists that a graph reads are freed",
)


WINDOWS = (original.Window(5, 9, 5, 6, 3), original.Window(9, 6, 16, 5, 1))
# Text keys end within a step; a ring of the second level has a hole.
FAR_WINDOWS = (original.Window(7, 18, 5, 2, far_levels=3),)
# What a query sees is many tiles.
WIDE_WINDOW = original.Window(17, 41, 1, 32)


def battery(
    launch, tables, geometry, backward, far_backward, pooling, resident, part, far, group=1
) -> Iterator[float]:
    """Relative errors of the pooling, the forward or the backward pass, of a few small problems.

    group: query heads that read each of two key heads.
    """
    if part == "pooling":
        yield from pooling_battery(pooling)
        return
    if part == "replay":
        yield replay_battery(geometry, resident)
        return
    wide = part == "wide"
    side = 8 if wide else 4
    config = tables.ForwardConfig(geometry.Tiling(*(side,) * 4), 16, 4, 1, far_keys=16)
    run = tables.RunConfig(16, 16, 4, 1)
    tile = tables.TileConfig(geometry.Tiling(4, 8, 4, 8) if far else config.tiling, 4, 1)
    gradients = tables.BackwardConfig(tile, tile, tile, tile, run, run)
    image_attention, attention_backward = launch.image_attention, backward.attention_backward
    if far:
        image_attention = launch.far_attention
        attention_backward = far_backward.far_attention_backward
    for window in (WIDE_WINDOW,) if wide else FAR_WINDOWS if far else WINDOWS:
        text = window.text_length
        numbers = Geometry.of(window, 0.25)
        torch.manual_seed(0)
        # Values far from zero on average: a key more or less is then always seen.
        shape, heads = (1, window.sequence_length, 2 * group, 16), 2 * group
        query, key, value = (
            torch.randn(*shape[:2], each, 16, dtype=torch.float64) + 0.5 for each in (heads, 2, 2)
        )
        pooled_key, pooled_value = (pool(x, key, window) for x in (key, value))
        offset = torch.randn(window.far_levels, heads, dtype=torch.float64)
        bias = pooled_bias(window, heads, offset, query.device).double()
        tensors = (query, key, value, pooled_key, pooled_value, bias)
        truth = by_definition(tensors, window)
        tensors = [x.detach().float() for x in tensors]
        out, lse = torch.full(shape, float("nan")), torch.full(shape[:3], float("nan"))
        if part != "backward":
            image_attention(*tensors, out, lse, numbers, config)
            launch.text_attention(*tensors[:3], out, lse, text, 0.25, run, 8)
            yield from map(error_of, (out, lse), truth)
            continue
        grads = attention_backward(
            truth[0].float(), *tensors, truth[0].float(), truth[1].float(),
            numbers, config=gradients, programs=16,
        )  # fmt: skip
        yield from map(error_of, grads, truth[2:])


def pooling_battery(pooling) -> Iterator[float]:
    """Relative errors of keys and values, with learned weights, of two launches."""
    window = original.Window(5, 9, 0, 2, far_levels=4)
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, window.sequence_length, 2, 16, dtype=torch.float64) + 0.5
    weight = torch.rand(window.far_levels, 2, 2, dtype=torch.float64)
    truth = (far_means_by_definition(x, key, window, 0.05, weight) for x in (key, value))
    sizes = window.height, window.width, window.far_levels
    pooled = pooling.pool_cells(key.float(), value.float(), weight.float(), *sizes, 0.05)
    yield from map(error_of, pooled, truth)


def replay_battery(geometry, resident) -> float:
    """0 if a graph, of which nothing is here but its capture, may read its lists for good."""
    cpu, tiling, state = torch.device("cpu"), geometry.Tiling(4, 4, 4, 4), {"capture": False}
    resident.capturing = lambda device: state["capture"]
    resident._residents = resident.Residents(most_bytes=1)
    geometry.visits(9, 11, 3, tiling, cpu)
    state["capture"] = True
    lists = weakref.ref(geometry.visits(9, 11, 3, tiling, cpu))
    try:
        geometry.visits(9, 12, 3, tiling, cpu)
    except RuntimeError:
        state["capture"] = False
    for width in range(20, 24):
        geometry.visits(9, width, 3, tiling, cpu)
    gc.collect()
    return 1.0 if lists() is None or state["capture"] else 0.0


def error_of(found, exact) -> float:
    error = relative_error(found, exact) if exact.numel() else 0.0
    return error if error == error else float("inf")


def pool(tokens, key, window):
    """Pooled tokens; none without pooling."""
    if window.far_levels:
        return far_means_by_definition(tokens, key, window, 0.25)
    if window.down_factor == 1:
        return tokens[:, :0]
    weight = torch.full((window.down_factor,) * 2, window.down_factor**-2.0, dtype=tokens.dtype)
    return pool_by_definition(tokens, window, weight)


def by_definition(tensors, window):
    """Output, log-sum-exp and the six gradients for a gradient that equals the output."""
    query, key, value, pooled_key, pooled_value, bias = leaves = [
        x.requires_grad_() for x in tensors
    ]
    keys, values = (
        repeated(torch.cat(pair, 1), query.shape[2] // key.shape[2])
        for pair in ((key, pooled_key), (value, pooled_value))
    )
    scores = torch.einsum("bqhd,bkhd->bqhk", query, keys) * 0.25
    scores = scores + torch.nn.functional.pad(bias.T, (scores.shape[-1] - len(bias), 0))
    mask = window.mask()[None, :, None, :]
    scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), values)
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
    # An operator of the copy must not take the place of the package's own.
    pooling = folder / "pooling.py"
    pooling.write_text(pooling.read_text().replace('"clear_dit::', f'"{name}::'))
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = [
        importlib.import_module(f"{name}.triton.{module}")
        for module in (
            "launch",
            "tables",
            "geometry",
            "backward",
            "far_backward",
            "pooling",
            "resident",
        )
    ]
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    return modules


PARTS = (
    ("pooling", False), ("forward", False), ("forward", True), ("wide", False),
    ("backward", False), ("backward", True),
)  # fmt: skip
# Whose faults of grouped heads there are.
OF_GROUPS = (("forward", False), ("forward", True), ("backward", False), ("backward", True))


@pytest.mark.parametrize(
    ("part", "far", "group"),
    slow_but(
        [(*part, group) for part in PARTS for group in (1, 2) if group == 1 or part in OF_GROUPS],
        (*PARTS[0], 1),
    ),
)
def test_the_battery_passes_without_a_fault(part, far, group, tmp_path, monkeypatch):
    modules = load(tmp_path, f"unchanged_{part}_{far}_{group}", monkeypatch)
    assert max(battery(*modules, part, far, group)) < 1e-5


@pytest.mark.parametrize("fault", slow_but(MUTANTS, *QUICK))
def test_a_fault_is_noticed(fault, tmp_path, monkeypatch):
    name = "mutant_" + "".join(c if c.isalnum() else "_" for c in fault)
    first = re.split("[ :]", fault)[0]
    own = {"gradients": "backward"} | {part: part for part in ("pooling", "replay", "wide")}
    part = own.get(first, "forward")
    modules = load(tmp_path, name, monkeypatch, MUTANTS[fault])
    group = 2 if "groups" in fault else 1
    assert any(error > 1e-3 for error in battery(*modules, part, "far:" in fault, group))
