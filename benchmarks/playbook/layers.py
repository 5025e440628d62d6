"""One attention layer at every size: CLEAR and its peers, replayed, backward; norm and rotation.

What is wrong has no times: outputs against float64 on a sample of queries at the size itself,
gradients on a small grid, and at the production shape on a sample of tokens too. The Triton
kernels run with the entry that the sweep found right and fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from clear_dit.bench.attention import TOLERANCE, bench_attention, sampled_errors
from clear_dit.bench.timing import time_in_turn
from clear_dit.errors import RequestError
from clear_dit.kernels.triton.norm_rope import norm_rope
from clear_dit.kernels.triton.ops import triton_attention

from .check_kinds import plain_norm_rope, poisoned
from .entries import chosen_entry, entry_of
from .gradients import sampled_gradient_errors
from .part_file import PartFile
from .pin import pinned
from .setting import Setting, Task


def tasks(setting: Setting) -> list[Task]:
    """In order of importance; the production shape of CLEAR's forward is a part of its own."""
    sizes, first = setting.sizes[::-1], setting.radii[0]
    grid = [(size, radius) for size in sizes for radius in setting.radii]
    forward = [(setting.impl, size, radius) for size, radius in grid if size != sizes[0]]
    # Full attention knows no radius.
    forward += [(impl, size, first) for impl in setting.dense for size in sizes]
    forward += [(impl, sizes[0], first) for impl in setting.peers]
    return [
        *(_layer_task(setting, *each) for each in forward),
        *(
            Task(f"replay {size} px r={radius}", partial(_replay, setting, size, radius))
            for size in setting.replayed
            for radius in setting.radii
        ),
        *(
            Task(gradients_label(sizes[0], radius), partial(_gradients, setting, radius))
            for radius in setting.radii
        ),
        *(_layer_task(setting, setting.impl, *each, backward=True) for each in grid),
        # At the largest size a backward pass of full attention takes longer than all else.
        *(
            _layer_task(setting, impl, size, first, backward=True)
            for impl in setting.dense
            for size in sizes[1:]
        ),
        *(Task(f"norm_rope {size} px", partial(_norm_rope, setting, size)) for size in sizes),
        *(
            _layer_task(setting, impl, *each)
            for each in grid
            for impl in setting.peers
            if each != (sizes[0], first)
        ),
    ]


def gradients_label(size: int, radius: int) -> str:
    """Of the task that looks at the gradients."""
    return f"gradients {size} px r={radius}"


def compile_ahead(setting: Setting) -> None:
    """Run the peers that PyTorch compiles, which keeps what it compiled on disk."""
    for radius in setting.radii:  # the first is that of the headline
        for impl in setting.peers:
            with suppress(Exception):  # it will be named when its turn comes
                list(_layer(setting, impl, setting.sizes[-1], radius, False, repeats=1))


def _layer_task(
    setting: Setting, impl: str, size: int, radius: int, backward: bool = False
) -> Task:
    of = "" if impl in setting.dense else f" r={radius}"
    long = impl in setting.dense and size == setting.sizes[-1]
    run = partial(
        _layer, setting, impl, size, radius, backward, repeats=1 if long else setting.repeats
    )
    return Task(f"{impl} {size} px{of}{' backward' * backward}", run)


def _layer(
    setting: Setting, impl: str, size: int, radius: int, backward: bool, repeats: int
) -> Iterator[dict[str, Any]]:
    """A row of `bench_attention`, and `dense_tflops` of full attention."""
    dense = impl in setting.dense
    problem, entry = setting.problem(setting.window(size, radius)), entry_of(setting, impl, radius)
    row: dict[str, Any] = {"impl": impl, "size": size, "radius": None if dense else radius}
    row["entry"] = entry
    if backward and (impl, size) == (setting.impl, setting.sizes[-1]):
        label = gradients_label(size, radius)
        if label not in PartFile(setting.folder, "layers").read().complete:
            yield row | {"problem": f"not timed: {label!r} is not right, or was not looked at"}
            return
    try:
        with pinned(entry):
            result = bench_attention(problem, [impl], repeats, backward)
    except RequestError as error:  # it cannot run here
        yield row | {"skipped": str(error)}
        return
    (found,) = result["rows"]
    row |= found
    if row["ms"] is None:
        row["problem"] = f"wrong: errors {[row[name] for name in row if name.endswith('_error')]}"
    elif dense:
        flops = 4 * problem.window.sequence_length**2 * problem.heads * problem.head_dim
        row |= {"useful_tflops": None, "dense_tflops": flops / row["ms"] / 1e9}
    yield row


def _replay(setting: Setting, size: int, radius: int) -> Iterator[dict[str, Any]]:
    """CLEAR called by Python, and the same launches replayed from a graph: what the host costs."""
    entry = chosen_entry(setting, radius)
    with pinned(entry):
        yield _replay_row(setting, size, radius) | {"entry": entry}


def _replay_row(setting: Setting, size: int, radius: int) -> dict[str, Any]:
    window = setting.window(size, radius)
    problem = setting.problem(window)
    tensors = problem.tensors(seed=1)
    run = partial(triton_attention, *tensors, window, scale=setting.head_dim**-0.5)
    replay, results = _captured(run, setting.device)
    # What a replay computes is of the numbers that are there now, not of those it was captured on.
    for static, fresh in zip(tensors, problem.tensors(seed=2), strict=True):
        static.copy_(fresh)
    replay()
    out, lse = results()
    errors = sampled_errors(out, tensors, window, lse=lse)
    row = {"impl": "triton", "size": size, "radius": radius, **errors._asdict()}
    if not errors.right(setting.dtype):
        return row | {"problem": f"wrong: {errors}"}
    runs = {"called": run, "replay": replay}
    seconds = time_in_turn(runs, setting.repeats, setting.device)
    return row | {f"{name}_ms": each * 1e3 for name, each in seconds.items()}


def _captured(
    run: Callable[[], Any], device: torch.device
) -> tuple[Callable[[], object], Callable[[], Any]]:
    """What replays a call, and what tells its last results; without graphs it calls."""
    if device.type != "cuda":
        found: list[Any] = []
        return lambda: found.append(run()), lambda: found[-1]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, lambda: results


def _gradients(setting: Setting, radius: int) -> Iterator[dict[str, Any]]:
    """Gradients at the production shape, of a sample of tokens; the small grid is no 8192 px."""
    size = setting.sizes[-1]
    window = setting.window(size, radius)
    problem = setting.problem(window)
    query, key, value = (x.requires_grad_() for x in problem.tensors())
    entry = chosen_entry(setting, radius)
    with pinned(entry):
        out, lse = triton_attention(query, key, value, window, scale=setting.head_dim**-0.5)
    grad = problem.tensors(seed=3)[0]
    out.backward(grad)
    errors = sampled_gradient_errors(query, key, value, out.detach(), lse, grad, window)
    row = {"impl": "triton", "size": size, "radius": radius, "entry": entry, **errors}
    wrong = not all(error <= TOLERANCE[setting.dtype] for error in errors.values())
    yield row | ({"problem": "wrong gradients"} if wrong else {})


def _norm_rope(setting: Setting, size: int) -> Iterator[dict[str, Any]]:
    """Query or key of a double block, normed, joined and rotated: fused, and step by step."""
    device, heads, head_dim = setting.device, setting.heads, setting.head_dim
    window = setting.window(size, setting.radii[0])
    weights = [torch.rand(head_dim, device=device).to(setting.dtype) + 0.5 for _ in range(2)]
    image, text = (
        torch.randn(1, length, heads, head_dim, device=device).to(setting.dtype)
        for length in (window.image_length, window.text_length)
    )
    angles = torch.rand(window.sequence_length, head_dim // 2, device=device)
    cos, sin = (f(angles).repeat_interleave(2, dim=1) for f in (torch.cos, torch.sin))
    runs = {
        name: partial(function, image, text, *weights, cos, sin)
        for name, function in (("fused", partial(norm_rope, eps=1e-6)), ("stock", plain_norm_rope))
    }
    exact = plain_norm_rope(*(x.double() for x in (image, text, *weights)), cos, sin)
    with poisoned():
        error = float((runs["fused"]().double() - exact).norm() / exact.norm())
    del exact
    row: dict[str, Any] = {"impl": "norm_rope", "size": size, "error": error}
    if not error <= TOLERANCE[setting.dtype]:
        yield row | {"problem": "wrong"}
        return
    # Tokens read and written once, and the rotary tables read.
    moved = 2 * window.sequence_length * heads * head_dim * setting.dtype.itemsize
    moved += 2 * window.sequence_length * head_dim * 4
    for name, seconds in time_in_turn(runs, setting.repeats, device).items():
        row |= {f"{name}_ms": seconds * 1e3, f"{name}_gb_s": moved / seconds / 1e9}
    yield row
