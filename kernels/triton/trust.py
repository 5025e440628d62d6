"""Is a kernel right on this device? Looked at once, on a small problem, before it is used.

What no one has tried the kernels on - a GPU, a driver, a version of Triton - must not show in an
image. Every kernel, entry of a table and dtype is compared with dense attention in float64 on a
grid of odd sides, the first time it is wanted: a fraction of a second beside its compilation.
CLEAR_DIT_SELF_CHECK=0 leaves that out.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..opaque import Geometry
from ..pooling import pool_cells_by_operators, pooled_bias, pooled_keys
from ..reference import reference_attention
from ..window import Window
from . import tables
from .backward import attention_backward
from .device import Kernel, capturing, programs, run_apart
from .failures import ONLY, failure, of_entry, record_failure
from .far_backward import far_attention_backward
from .launch import attention_of, table_key, text_attention
from .norm_rope import norm_rope
from .pooling import pool_cells

SWITCH = "CLEAR_DIT_SELF_CHECK"
BATCH, HEADS = 2, 2
# Largest relative error of a result, of a log-sum-exp in absolute terms. Rounding costs a quarter
# of it at most; one key more or less of the problems below costs more.
FORWARD = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BACKWARD = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
LSE = 1e-3


class Problem(NamedTuple):
    """Windows that the kernels are looked at with, in tokens; text and sides end within tiles."""

    forward: Window = Window(37, 43, 33, 20)
    pooled: Window = Window(37, 43, 33, 12, 4, pooled_weight="count")
    far: Window = Window(37, 43, 33, 4, far_levels=6)
    backward: Window = Window(19, 27, 21, 12, 2)
    backward_far: Window = Window(19, 27, 21, 3, far_levels=5)


@dataclass(frozen=True)
class Finding:
    """What a look at a kernel showed.

    Attributes:
        errors: of its results, by name; relative, but for a log-sum-exp.
        wrong: why it is not to be used; None if it is right.
        seconds: that it took, compilation included.
    """

    kernel: Kernel
    entry: str
    errors: Mapping[str, float]
    wrong: str | None
    seconds: float


def entries_of(kernel: Kernel) -> tuple[str, ...]:
    """Names of the entries that a kernel's table has for its device; `ONLY` without a choice."""
    if kernel.name not in FORWARD_KERNELS:
        return (ONLY,)
    return tuple(entry.name for entry in _forward_entries(kernel))


def why_not_trusted(kernel: Kernel) -> str | None:
    """Why no entry of a kernel may be used on its device; None if one may.

    Raises:
        RuntimeError: it was never looked at, and a CUDA graph is being captured.
    """
    reasons = []
    for entry in entries_of(kernel):
        reason = why_not_entry(kernel, entry)
        if reason is None:
            return None
        reasons.append(f"{entry} {reason}" if entry != ONLY else reason)
    return f"does not work on {kernel.device}: {'; '.join(reasons)}"


def why_not_entry(kernel: Kernel, entry: str) -> str | None:
    """Why an entry of a kernel may not be used; it is looked at if it was not yet."""
    known = failure(kernel, entry)
    if known is not None or os.environ.get(SWITCH) == "0" or kernel.device.type != "cuda":
        return known
    return _why_wrong(kernel, entry)


@functools.cache
def _why_wrong(kernel: Kernel, entry: str) -> str | None:
    if capturing(kernel.device):
        raise RuntimeError(
            "local_attention: a CUDA graph cannot be captured with kernels that have not run "
            "before; call once, then capture."
        )
    found = look_at(kernel, entry)
    if found.wrong is not None:
        record_failure(kernel, entry, found.wrong)
    return found.wrong


def look_at(kernel: Kernel, entry: str, problem: Problem = Problem()) -> Finding:  # noqa: B008
    """Run a kernel on its problem and compare.

    Raises:
        RuntimeError: what is no fault of the kernel's, a device that was lost.
    """
    begin = time.perf_counter()
    try:
        errors = run_apart(kernel.device, lambda: _LOOKS[kernel.name](kernel, entry, problem))
    except Exception as error:
        return Finding(kernel, entry, {}, of_entry(error), time.perf_counter() - begin)
    limits = {
        name: LSE if name == "log-sum-exp" else _limit(kernel, name)[kernel.dtype]
        for name in errors
    }
    too_large = [
        f"{name} {error:.1e} (at most {limits[name]:.0e})"
        for name, error in errors.items()
        if not error <= limits[name]  # NaN too
    ]
    wrong = f"is wrong: error of {', '.join(too_large)}" if too_large else None
    return Finding(kernel, entry, errors, wrong, time.perf_counter() - begin)


def look_at_all(device: torch.device, dtype: torch.dtype, head_dim: int) -> Iterator[Finding]:
    """Findings of every kernel and entry for a dtype and head_dim."""
    for name in KERNELS:
        kernel = Kernel(device, dtype, head_dim, name)
        for entry in entries_of(kernel):
            yield look_at(kernel, entry)


def _limit(kernel: Kernel, result: str) -> dict[torch.dtype, float]:
    return BACKWARD if result.startswith("gradient") else FORWARD


def _forward_entries(kernel: Kernel) -> tuple[Any, ...]:
    key = table_key(kernel.device, kernel.dtype, kernel.head_dim)
    return tables.forward_configs(*key, far=kernel.name == "far")


def _random(kernel: Kernel, *shape: int) -> torch.Tensor:
    """Values far from zero on average: a key more or less is then always seen."""
    generator = torch.Generator().manual_seed(len(shape))
    made = torch.randn(shape, generator=generator) + 0.25
    return made.to(kernel.device, kernel.dtype)


def _tokens(kernel: Kernel, window: Window) -> list[torch.Tensor]:
    """Query, key and value."""
    shape = BATCH, window.sequence_length, HEADS, kernel.head_dim
    return list(_random(kernel, 3, *shape))


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _pooled(kernel: Kernel, key: torch.Tensor, value: torch.Tensor, window: Window) -> Any:
    """By PyTorch's operators, whatever pools otherwise."""
    scale, text = kernel.head_dim**-0.5, window.text_length
    if not window.far_levels:
        return [x.contiguous() for x in pooled_keys(key, value, window, None, scale)]
    return pool_cells_by_operators(
        key[:, text:], value[:, text:], key.new_empty(0, 2, 2),
        window.height, window.width, window.far_levels, scale,
    )  # fmt: skip


def _look_at_forward(kernel: Kernel, entry: str, problem: Problem) -> dict[str, float]:
    window: Window = getattr(problem, kernel.name)
    config = next(each for each in _forward_entries(kernel) if each.name == entry)
    query, key, value = _tokens(kernel, window)
    pooled = _pooled(kernel, key, value, window)
    bias = pooled_bias(window, HEADS, None, kernel.device)
    scale, text = kernel.head_dim**-0.5, window.text_length
    out = torch.full_like(query, float("nan"))
    lse = torch.full(query.shape[:3], float("nan"), device=kernel.device)
    text_attention(
        query, key, value, out, lse, text, scale,
        tables.text_config(*table_key(kernel.device, kernel.dtype, kernel.head_dim)),
        programs(kernel.device),
    )  # fmt: skip
    attention_of(config, window.far_levels > 0)(
        query, key, value, *pooled, bias, out, lse, Geometry.of(window, scale), config
    )
    exact, exact_lse = reference_attention(
        query.double(), key.double(), value.double(), window, scale=scale,
        pooled=(pooled[0].double(), pooled[1].double()),
    )  # fmt: skip
    return {
        "text": _relative(out[:, :text], exact[:, :text]),
        "image": _relative(out[:, text:], exact[:, text:]),
        "log-sum-exp": float((lse - exact_lse).abs().max()),
    }


def _look_at_backward(kernel: Kernel, entry: str, problem: Problem) -> dict[str, float]:
    far = kernel.name == "backward far"
    window = problem.backward_far if far else problem.backward
    query, key, value = _tokens(kernel, window)
    pooled_key, pooled_value = _pooled(kernel, key, value, window)
    inputs = (query, key, value, pooled_key, pooled_value)
    grad = _random(kernel, BATCH, window.sequence_length, HEADS, kernel.head_dim)
    bias, scale = pooled_bias(window, HEADS, None, kernel.device), kernel.head_dim**-0.5
    wide = [x.double().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, lse = reference_attention(
            wide[0], wide[1], wide[2], window, scale=scale, pooled=(wide[3], wide[4])
        )
    exact = torch.autograd.grad(out, wide, grad.double())
    run = far_attention_backward if far else attention_backward
    found = run(
        grad, query, key, value, pooled_key, pooled_value, bias,
        out.detach().to(kernel.dtype), lse.detach().float().contiguous(),
        Geometry.of(window, scale),
        config=tables.backward_config(*table_key(kernel.device, kernel.dtype, kernel.head_dim)),
        programs=programs(kernel.device),
    )  # fmt: skip
    names = ("query", "key", "value", "pooled key", "pooled value")
    return {
        f"gradient of {name}": _relative(one, other)
        for name, one, other in zip(names, found, exact, strict=False)
    }


def _look_at_pooling(kernel: Kernel, entry: str, problem: Problem) -> dict[str, float]:
    window, scale = problem.far, kernel.head_dim**-0.5
    _, *tokens = _tokens(kernel, window)
    image = [x[:, window.text_length :] for x in tokens]
    weight = _random(kernel, window.far_levels, 2, 2)
    inputs = [*image, weight]

    def pooled(by: Callable[..., Any], dtype: torch.dtype) -> Any:
        sizes = window.height, window.width, window.far_levels, scale
        return by(*(x.to(dtype) for x in inputs), *sizes)

    found = pooled(pool_cells, kernel.dtype)
    exact = pooled(pool_cells_by_operators, torch.float64)
    names = ("pooled key", "pooled value")
    return {name: _relative(*pair) for name, *pair in zip(names, found, exact, strict=True)}


def _look_at_norm_rope(kernel: Kernel, entry: str, problem: Problem) -> dict[str, float]:
    window, head_dim = problem.backward, kernel.head_dim
    image, text = (
        _random(kernel, BATCH, length, HEADS, head_dim)
        for length in (window.image_length, window.text_length)
    )
    weights = [1 + _random(kernel, head_dim) / 2 for _ in range(2)]
    angles = _random(kernel, window.sequence_length, head_dim // 2).float() * 100
    cos, sin = (f(angles).repeat_interleave(2, dim=1) for f in (torch.cos, torch.sin))
    grad = _random(kernel, BATCH, window.sequence_length, HEADS, head_dim)

    def gradients(run: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (image, text, *weights)]
        with torch.enable_grad():
            out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    def plain(image, text, weight, text_weight):
        norm = functools.partial(torch.nn.functional.rms_norm, eps=1e-6)
        joint = torch.cat(
            [norm(text, (head_dim,), text_weight), norm(image, (head_dim,), weight)], 1
        )
        even, odd = joint.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], -1).flatten(-2)
        return joint * cos.double()[:, None] + turned * sin.double()[:, None]

    found = gradients(lambda *leaves: norm_rope(*leaves, cos, sin, 1e-6), kernel.dtype)
    exact = gradients(plain, torch.float64)
    names = ("output", *(f"gradient of {name}" for name in ("image", "text", "norm", "text norm")))
    return {name: _relative(*pair) for name, *pair in zip(names, found, exact, strict=True)}


FORWARD_KERNELS = ("forward", "pooled", "far")
_LOOKS: dict[str, Callable[[Kernel, str, Problem], dict[str, float]]] = {
    **dict.fromkeys(FORWARD_KERNELS, _look_at_forward),
    "backward": _look_at_backward,
    "backward far": _look_at_backward,
    "pooling": _look_at_pooling,
    "norm_rope": _look_at_norm_rope,
}
KERNELS = tuple(_LOOKS)
