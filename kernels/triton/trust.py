"""Is a kernel right on this device? Looked at once, on small problems, before it is used.

What no one has tried the kernels on - a GPU, a driver, a version of Triton - must not show in an
image. Every kernel, entry of a table and dtype is compared with dense attention in float64 on a
CPU, the first time it is wanted. Its compilation takes longer: sides that are odd and multiples
of 16, as FLUX's are, make different binaries. CLEAR_DIT_SELF_CHECK=0 leaves that out.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..opaque import Geometry
from ..pooling import pool_cells_by_operators, pooled_bias, pooled_keys
from ..reference import reference_attention
from ..window import Window
from . import on_disk, tables
from .backward import attention_backward
from .device import CaptureError, Kernel, capturing, programs, run_apart
from .entry import attention_of
from .failures import ONLY, blame, failure, record_failure
from .far_backward import far_attention_backward
from .launch import table_key, text_attention
from .norm_rope import norm_rope, norm_rope_backward
from .pooling import pool_cells

SWITCH = "CLEAR_DIT_SELF_CHECK"
BATCH, KEY_HEADS = 2, 2
# What begins the finding of a kernel of which nothing is known.
UNTRIED = "could not be tried"
# A process that looks at one kernel may take, its start and compilation included.
SECONDS = 120
# Loads this package by its file: a copy of it may have a name that no path leads to.
PROCESS = """
import importlib.util, sys
package, file, module, asked = sys.argv[1:]
spec = importlib.util.spec_from_file_location(package, file)
sys.modules[package] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[package])
importlib.import_module(module).main(asked)
"""
# Largest relative error of a row of a result, of a log-sum-exp in absolute terms. Rounding costs
# a third of it at most.
FORWARD = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
BACKWARD = {torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 5e-2}
LSE = 1e-3

Windows = tuple[Window, ...]
# (name, what a kernel gave, the truth, which is on the CPU)
Results = list[tuple[str, torch.Tensor, torch.Tensor]]


class Problems(NamedTuple):
    """Windows that the kernels are looked at with, in tokens.

    Sides and text that end within tiles, then such that do not: each is a binary of its own. Text
    of several blocks, of an odd number and an even, and none: each is a loop of its own.
    """

    forward: Windows = (
        Window(21, 27, 225, 17), Window(16, 32, 192, 8), Window(16, 32, 0, 8),
    )  # fmt: skip
    pooled: Windows = (Window(21, 27, 33, 12, 4, pooled_weight="count"), Window(16, 32, 64, 8, 2))
    far: Windows = (Window(21, 27, 33, 4, far_levels=5), Window(16, 32, 64, 8, far_levels=5))
    backward: Windows = (Window(19, 27, 21, 12, 2), Window(16, 32, 64, 8))
    backward_far: Windows = (Window(19, 27, 21, 3, far_levels=5),)


@dataclass(frozen=True)
class Finding:
    """What a look at a kernel showed.

    Attributes:
        errors: the largest of each result, by name.
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
    if kernel.name not in WITH_ENTRIES:
        return (ONLY,)
    return tuple(entry.name for entry in _entries(kernel))


def why_not_trusted(kernel: Kernel) -> str | None:
    """Why no entry of a kernel may be used on its device; None if one may.

    Raises:
        CaptureError: it was never looked at, and a CUDA graph is being captured.
    """
    reasons = []
    for entry in entries_of(kernel):
        reason = why_not_entry(kernel, entry)
        if reason is None:
            return None
        reasons.append(f"{entry} {reason}" if entry != ONLY else f"{kernel.name} {reason}")
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
        raise CaptureError
    found = (look_in_a_process if may_hang(kernel, entry) else look_at)(kernel, entry)
    if found.wrong is not None:
        record_failure(kernel, entry, found.wrong)
    return found.wrong


def look_at(kernel: Kernel, entry: str, problems: Problems = Problems()) -> Finding:  # noqa: B008
    """Run a kernel on its problems and compare.

    Raises:
        RuntimeError: what is no fault of the kernel's, such as a lack of memory.
    """
    begin = time.perf_counter()
    try:
        errors = run_apart(kernel.device, lambda: _errors(kernel, entry, problems))
    except _KernelFailedError as failed:
        try:
            wrong = blame(failed.error, kernel.device)
        except Exception as error:
            error.add_note(f"{kernel}, entry {entry}, was looked at; {SWITCH}=0 leaves that out.")
            raise
        return Finding(kernel, entry, {}, wrong, time.perf_counter() - begin)
    too_large = [
        f"{name} {error:.1e} (at most {_limit(kernel, name):.0e})"
        for name, error in errors.items()
        if not error <= _limit(kernel, name)  # NaN too
    ]
    found = f"is wrong: error of {', '.join(too_large)}" if too_large else None
    return Finding(kernel, entry, errors, found, time.perf_counter() - begin)


class _KernelFailedError(Exception):
    """A launch raised."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _errors(kernel: Kernel, entry: str, problems: Problems) -> dict[str, float]:
    windows: Windows = getattr(problems, _WINDOWS_OF[kernel.name])
    errors: dict[str, float] = {}
    for window in windows:
        for name, found, exact in _LOOKS[kernel.name](kernel, entry, window):
            error = _largest(name, found.detach().cpu(), exact.detach())
            errors[name] = max(errors.get(name, 0.0), error)
    return errors


def _largest(name: str, found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest relative error of a row, of rows that are not small; infinite for NaN."""
    difference = found.double() - exact
    if not difference.isfinite().all():
        return float("inf")
    if name == "log-sum-exp":
        return float(difference.abs().max())
    rows = exact.norm(dim=-1)
    return float((difference.norm(dim=-1) / rows.clamp(min=float(rows.mean()) / 4)).max())


def _limit(kernel: Kernel, result: str) -> float:
    if result == "log-sum-exp":
        return LSE
    return (BACKWARD if result.startswith("gradient") else FORWARD)[kernel.dtype]


def _launched(launch: Callable[[], Any]) -> Any:
    """What a launch returns; an error of its own is a `_KernelFailedError`."""
    try:
        found = launch()
    except Exception as error:
        raise _KernelFailedError(error) from error
    return found


def may_hang(kernel: Kernel, entry: str) -> bool:
    """Whether warps of an entry wait for each other by barriers of their own."""
    return kernel.name in WITH_ENTRIES and any(
        isinstance(each, tables.GluonConfig) and each.name == entry for each in _entries(kernel)
    )


def look_in_a_process(kernel: Kernel, entry: str, anew: bool = False) -> Finding:
    """`look_at` where a kernel that never ends ends with its process, after `SECONDS` at most.

    What it finds is kept on disk: a process takes seconds to start. That it did not end is kept
    the second time: a crowded machine may be slow.

    Args:
        anew: look whatever is kept.
    """
    begin, name = time.perf_counter(), _name_on_disk(kernel, entry)
    kept = None if anew else _findings.get(name)
    if kept is None or kept.get("tries") == 1:
        dtype = str(kernel.dtype).removeprefix("torch.")
        told = _ask([str(kernel.device), dtype, *kernel[2:], entry])
        if told is None:
            tries = 1 if kept is None else 2
            kept = {"errors": {}, "wrong": f"did not end within {SECONDS} s", "tries": tries}
        else:
            kept = told
        if kept.pop("keep", True):
            _findings.keep(name, kept)
    return Finding(kernel, entry, kept["errors"], kept["wrong"], time.perf_counter() - begin)


def _ask(asked: Sequence[Any]) -> dict[str, Any] | None:
    """What a process of `main` tells; None if it does not end."""
    package = __name__.partition(".")[0]
    about = [package, str(sys.modules[package].__file__), __name__, json.dumps(asked)]
    command = [sys.executable or "python3", "-c", PROCESS, *about]
    path = os.pathsep.join(filter(None, sys.path))
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return _untried(str(error))
    try:
        out, err = process.communicate(timeout=SECONDS)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # the compiler that it may have started too
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise
    try:
        told = json.loads(out.splitlines()[-1])
        return {"errors": told["errors"], "wrong": told["wrong"]}
    except (ValueError, IndexError, KeyError, TypeError):
        last = (err.strip().splitlines() or ["nothing"])[-1][:300]
        return _untried(f"its process ended with status {process.returncode}: {last}")


def _untried(why: str) -> dict[str, Any]:
    """There may have been no room on the device: the next process tries again."""
    return {"errors": {}, "wrong": f"{UNTRIED}: {why}", "keep": False}


def _name_on_disk(kernel: Kernel, entry: str) -> str:
    device = torch.cuda.get_device_name(kernel.device)
    return on_disk.name(device, str(kernel.dtype), *kernel[2:], entry)


def main(asked: str) -> None:
    """Print a finding as a line of JSON; ends itself should nobody be left to do so."""
    signal.alarm(int(SECONDS) + 1)
    device, dtype, *others, entry = json.loads(asked)
    kernel = Kernel(torch.device(device), getattr(torch, dtype), *others)
    torch.empty(1, device=kernel.device)  # a device that cannot be had is no kernel's fault
    found = look_at(kernel, entry)
    print(json.dumps({"errors": dict(found.errors), "wrong": found.wrong}))


def look_at_all(device: torch.device, dtype: torch.dtype, head_dim: int) -> Iterator[Finding]:
    """Findings of every kernel and entry for a dtype and head_dim."""
    for name in KERNELS:
        kernel = Kernel(device, dtype, head_dim, name)
        for entry in entries_of(kernel):
            if may_hang(kernel, entry):
                yield look_in_a_process(kernel, entry, anew=True)
            else:
                yield look_at(kernel, entry)


def _entries(kernel: Kernel) -> tuple[tables.AnyForwardConfig, ...]:
    return tables.forward_configs(*_table_key(kernel), far=kernel.name == "far")


def _table_key(kernel: Kernel) -> tuple[str, int, int]:
    return table_key(kernel.device, kernel.dtype, kernel.head_dim)


class _Random:
    """Tensors of a dtype, always the same."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._seeds = dtype, itertools.count()

    def __call__(self, *shape: int, mean: float = 0.25, scale: float = 1.0) -> torch.Tensor:
        """On the CPU; far from zero on average, so that a key more or less is seen."""
        generator = torch.Generator().manual_seed(next(self._seeds))
        made = torch.randn(shape, generator=generator, dtype=torch.float32) * scale + mean
        return made.to(self._dtype)

    def tokens(self, window: Window, head_dim: int, group: int = 1) -> list[torch.Tensor]:
        """Query, key and value on the CPU."""
        heads = KEY_HEADS * group, KEY_HEADS, KEY_HEADS
        return [self(BATCH, window.sequence_length, each, head_dim) for each in heads]


def _pooled(key: torch.Tensor, value: torch.Tensor, window: Window) -> list[torch.Tensor]:
    """By PyTorch's operators, whatever pools otherwise."""
    scale, text = key.shape[-1] ** -0.5, window.text_length
    if not window.far_levels:
        return [x.contiguous() for x in pooled_keys(key, value, window, None, scale)]
    pooled = pool_cells_by_operators(
        key[:, text:], value[:, text:], key.new_empty(0, 2, 2),
        window.height, window.width, window.far_levels, scale,
    )  # fmt: skip
    return list(pooled)


# All entries of a kernel, and the text's, are compared with the same.
@functools.lru_cache(maxsize=8)
def _truth(
    dtype: torch.dtype, head_dim: int, group: int, window: Window
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Query, key, value and pooled ones on the CPU; output and log-sum-exp in float64."""
    query, key, value = _Random(dtype).tokens(window, head_dim, group)
    pooled_key, pooled_value = _pooled(key, value, window)
    exact, exact_lse = reference_attention(
        query.double(), key.double(), value.double(), window, scale=head_dim**-0.5,
        pooled=(pooled_key.double(), pooled_value.double()),
    )  # fmt: skip
    return [query, key, value, pooled_key, pooled_value], exact, exact_lse


def _look_at_forward(kernel: Kernel, entry: str, window: Window) -> Results:
    scale, text = kernel.head_dim**-0.5, window.text_length
    given, exact, exact_lse = _truth(kernel.dtype, kernel.head_dim, kernel.group, window)
    inputs = [x.to(kernel.device) for x in given]
    bias = pooled_bias(window, inputs[0].shape[2], None, kernel.device)
    out = torch.full_like(inputs[0], float("nan"))
    lse = torch.full(out.shape[:3], float("nan"), dtype=torch.float32, device=kernel.device)
    if kernel.name == "text" and not text:
        return []
    if kernel.name == "text":
        config = tables.text_config(*_table_key(kernel))
        splits = programs(kernel.device)
        q, k, v, *_ = inputs
        _launched(lambda: text_attention(q, k, v, out, lse, text, scale, config, splits))
        rows = slice(None, text)
    else:
        far, geometry = window.far_levels > 0, Geometry.of(window, scale)
        each = next(each for each in _entries(kernel) if each.name == entry)
        _launched(lambda: attention_of(each, far)(*inputs, bias, out, lse, geometry, each))
        rows = slice(text, None)
    return [
        ("output", out[:, rows], exact[:, rows]),
        ("log-sum-exp", lse[:, rows], exact_lse[:, rows]),
    ]


def _look_at_backward(kernel: Kernel, entry: str, window: Window) -> Results:
    random, scale = _Random(kernel.dtype), kernel.head_dim**-0.5
    query, key, value = random.tokens(window, kernel.head_dim, kernel.group)
    grad = random(*query.shape)
    inputs = [query, key, value, *_pooled(key, value, window)]
    wide = [x.double().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, lse = reference_attention(
            wide[0], wide[1], wide[2], window, scale=scale, pooled=(wide[3], wide[4])
        )
    # The kernels are given the rounded output; to be off is to have a gradient of log-sum-exp.
    rounded = out.detach().to(kernel.dtype)
    off = ((out.detach() - rounded) * grad).sum(-1)
    exact = torch.autograd.grad((out, lse), wide, (grad.double(), off))
    device = kernel.device
    given = [x.to(device) for x in (grad, *inputs)]
    rest = [
        pooled_bias(window, query.shape[2], None, device),
        rounded.to(device),
        lse.detach().to(device, torch.float32).contiguous(),
    ]
    run: Callable[..., Any] = far_attention_backward if window.far_levels else attention_backward
    options = {"config": tables.backward_config(*_table_key(kernel)), "programs": programs(device)}
    found = _launched(lambda: run(*given, *rest, Geometry.of(window, scale), **options))
    names = ("query", "key", "value", "pooled key", "pooled value")
    return [
        (f"gradient of {name}", one, other)
        for name, one, other in zip(names, found[: len(names)], exact, strict=True)
        if other.numel()
    ]


def _look_at_pooling(kernel: Kernel, entry: str, window: Window) -> Results:
    random, scale = _Random(kernel.dtype), kernel.head_dim**-0.5
    _, *tokens = random.tokens(window, kernel.head_dim)
    inputs = [x[:, window.text_length :] for x in tokens]
    inputs.append(random(window.far_levels, 2, 2, scale=1 / 32))

    def pooled(by: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Any:
        sizes = window.height, window.width, window.far_levels, scale
        return by(*(x.to(device, dtype) for x in inputs), *sizes)

    exact = pooled(pool_cells_by_operators, torch.device("cpu"), torch.float64)
    found = _launched(lambda: pooled(pool_cells, kernel.device, kernel.dtype))
    names = ("pooled key", "pooled value")
    return [(name, *pair) for name, *pair in zip(names, found, exact, strict=True)]


def _look_at_norm_rope(kernel: Kernel, entry: str, window: Window) -> Results:
    random, head_dim = _Random(kernel.dtype), kernel.head_dim
    image, text = (
        random(BATCH, length, KEY_HEADS, head_dim)
        for length in (window.image_length, window.text_length)
    )
    weights = [random(head_dim, mean=1.0, scale=0.5) for _ in range(2)]
    angles = 100 * random(window.sequence_length, head_dim // 2).float()
    cos, sin = (f(angles).repeat_interleave(2, dim=1) for f in (torch.cos, torch.sin))
    grad = random(BATCH, window.sequence_length, KEY_HEADS, head_dim)

    wide = [x.double().requires_grad_() for x in (image, text, *weights)]
    with torch.enable_grad():
        exact = _plain_norm_rope(wide[:2], wide[2:], cos.double(), sin.double())
    gradients = torch.autograd.grad(exact, wide, grad.double())
    given = [x.to(kernel.device) for x in (image, text, *weights, cos, sin)]
    found = _launched(lambda: norm_rope(*given, 1e-6))
    found_gradients = _launched(lambda: norm_rope_backward(grad.to(kernel.device), *given, 1e-6))
    names = ("image", "text", "norm", "text norm")
    return [
        ("output", found, exact),
        *(
            (f"gradient of {name}", one, other)
            for name, one, other in zip(names, found_gradients, gradients, strict=True)
        ),
    ]


def _plain_norm_rope(
    tokens: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """Of tokens and weights of the image, then of the text."""
    norms = [
        torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6)
        for x, weight in zip(tokens, weights, strict=True)
    ]
    joint = torch.cat(norms[::-1], 1)
    even, odd = joint.unflatten(-1, (-1, 2)).unbind(-1)
    return joint * cos[:, None] + torch.stack([-odd, even], -1).flatten(-2) * sin[:, None]


# Kernels of tables with several entries.
WITH_ENTRIES = ("forward", "pooled", "far")
_LOOKS: dict[str, Callable[[Kernel, str, Window], Results]] = {
    "text": _look_at_forward,
    **dict.fromkeys(WITH_ENTRIES, _look_at_forward),
    "backward": _look_at_backward,
    "backward far": _look_at_backward,
    "pooling": _look_at_pooling,
    "norm_rope": _look_at_norm_rope,
}
KERNELS = tuple(_LOOKS)
_WINDOWS_OF = dict(zip(KERNELS, KERNELS, strict=True)) | {
    "text": "forward",
    "backward far": "backward_far",
    "pooling": "far",
    "norm_rope": "backward",
}
_findings = on_disk.Kept("clear-dit-findings.json")
