"""How a Triton kernel is checked: against dense attention in float64 on the same device.

Tolerance: the error relative to float64 is at most twice that of a plain dense implementation in
the same dtype, plus two roundings; text and image rows apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import clear_dit.kernels.choice  # noqa: F401 - by which Triton pools for a model, and here
from clear_dit.kernels.pooling import pool_cells_by_operators, pooled_bias, pooled_keys
from clear_dit.kernels.triton import launch, tables
from clear_dit.kernels.triton.norm_rope import norm_rope
from clear_dit.kernels.triton.ops import triton_attention
from clear_dit.kernels.triton.pooling import pool_cells
from clear_dit.kernels.window import Window

from .pin import pinned

Tensors = Sequence[torch.Tensor]
HEADS = 2
# Largest error of a log-sum-exp, which is float32 whatever the inputs.
LSE_TOLERANCE = 1e-3
# Some milliseconds, in which the host launches all that a check does.
LATER_CYCLES = 20_000_000


@dataclass(frozen=True)
class Check:
    """One kernel on one problem.

    Attributes:
        subject: "attention", "text", "norm_rope", "pooling", or "forward" and an entry's name.
        kind: of KINDS.
        layout: of query, key and value in memory, see `_laid_out`.
        entry: of a table, where the kind takes one: the name of an image entry, or the text's.
        programs: among which the text's keys are split.
    """

    subject: str
    kind: str
    window: Window
    dtype: torch.dtype
    head_dim: int
    batch: int = 2
    layout: str = "contiguous"
    entry: Any = None
    programs: int = 1

    @property
    def case(self) -> str:
        """For a report."""
        w = self.window
        pooled = f", pooled by {w.down_factor}" if w.down_factor > 1 else ""
        pooled += ", counted" if w.pooled_weight == "count" else ""
        pooled += f", far keys of {w.far_levels} levels" if w.far_levels else ""
        return (
            f"{w.height}x{w.width} tokens, text {w.text_length}, radius {w.radius}{pooled}, "
            f"batch {self.batch}, head_dim {self.head_dim}, {self.layout}, {self.dtype}"
        )


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor | None,
    offset: torch.Tensor | None,
    window: Window,
) -> torch.Tensor:
    """Dense masked attention in the dtype of its inputs; in float64 the truth."""
    scores, value = _scores(query, key, value, weight, offset, window)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor | None,
    offset: torch.Tensor | None,
    window: Window,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = query.shape[-1] ** -0.5
    pooled = pooled_keys(key, value, window, weight, scale)
    key, value = (torch.cat(pair, dim=1) for pair in zip((key, value), pooled, strict=True))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    bias = pooled_bias(window, query.shape[2], offset, query.device).to(scores.dtype)
    scores = scores + torch.nn.functional.pad(bias.T, (key.shape[1] - len(bias), 0))[:, None]
    return scores.masked_fill(~window.mask(query.device), float("-inf")), value


def _laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values of (batch, tokens, heads, head_dim) in other places."""
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "batch apart":
        return torch.stack([x, x], dim=1)[:, 1]
    if layout == "padded channels":  # no multiple of 16 bytes: not for tensor descriptors
        return torch.nn.functional.pad(x, (0, 1))[..., :-1]
    return x


def _inputs(
    check: Check, device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Query, key, value and a gradient; what is learned: pooling weights, offsets of far keys."""
    generator = torch.Generator().manual_seed(0)
    shape = (check.batch, check.window.sequence_length, HEADS, check.head_dim)
    made = [
        _laid_out(torch.randn(shape, generator=generator).to(device, check.dtype), check.layout)
        for _ in range(4)
    ]
    factor, levels = check.window.down_factor, check.window.far_levels
    if levels:
        learned = [
            torch.rand(levels, 2, 2, generator=generator) / 2,
            torch.randn(levels, HEADS, generator=generator),
        ]
        return made, [x.to(device, check.dtype) for x in learned]
    if factor == 1:
        return made, [None, None]
    weight = 2 * torch.rand(factor, factor, generator=generator) / factor**2
    return made, [weight.to(device, check.dtype), None]


def _gradients(
    run: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor | None], grad: torch.Tensor
) -> list[torch.Tensor]:
    """The output, and the gradients of all inputs that there are."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    wanted = [x for x in leaves if x is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def _double(inputs: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if x is None else x.double() for x in inputs]


def _compare(
    names: Sequence[str], ours: Tensors, plain: Tensors, truth: Tensors, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row of error and bound for each result."""
    rows = []
    for name, value, yardstick, exact in zip(names, ours, plain, truth, strict=True):
        if value.dtype != dtype or value.shape != exact.shape:
            rows.append(
                {"what": name, "problem": f"is {value.dtype} {tuple(value.shape)}", "ok": False}
            )
            continue
        if exact.norm() < 1e-9:  # zero in truth: nothing but rounding noise
            error, bound = float(value.double().norm()), 1e-2
        else:
            # The gradient of what is learned is one sum over all tokens.
            roundings = 64 if name in ("spatial_weight", "far_offset") else 2
            error = _relative(value, exact)
            bound = 2 * _relative(yardstick, exact) + roundings * torch.finfo(dtype).eps
        rows.append({"what": name, "error": error, "bound": bound, "ok": error <= bound})
    return rows


def _relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def _check_gradients(check: Check, device: torch.device) -> list[dict[str, Any]]:
    """The op by the default entry: output, all gradients; the same on another stream, which starts
    later, and of an expanded gradient.
    """
    (*tokens, grad), learned = _inputs(check, device)
    inputs = [*tokens, *learned]

    options = {"scale": check.head_dim**-0.5}

    def run(query, key, value, weight, offset):
        learned = {"spatial_weight": weight, "far_offset": offset}
        return triton_attention(query, key, value, check.window, **options, **learned)[0]

    plain = partial(plain_attention, window=check.window)
    ones = grad.new_ones(check.head_dim).expand(grad.shape)
    with pinned(_default_entry(check, device)):
        ours = _gradients(run, inputs, grad)
        elsewhere = _on_another_stream(partial(_gradients, run), inputs, grad)
        expanded, whole = (_gradients(run, inputs, x)[1:] for x in (ones, ones.contiguous()))
    names = ["output", "query", "key", "value", "spatial_weight", "far_offset"][: len(ours)]
    yardstick = _gradients(plain, inputs, grad)
    exact = _gradients(plain, _double(inputs), grad.double())
    rows = _compare(names[1:], ours[1:], yardstick[1:], exact[1:], check.dtype)
    text = check.window.text_length
    for what, part in (("text rows", slice(None, text)), ("image rows", slice(text, None))):
        if exact[0][:, part].numel():
            outputs = ([found[0][:, part]] for found in (ours, yardstick, exact))
            rows += _compare([what], *outputs, check.dtype)
    expanded_names = [f"{name}, of an expanded gradient" for name in names[1:]]
    rows += _compare(expanded_names, expanded, whole, [x.double() for x in whole], check.dtype)
    same = all(map(torch.equal, ours, elsewhere))
    return [*rows, {"what": "the same bits on another stream", "ok": same}]


def _default_entry(check: Check, device: torch.device) -> str:
    key = launch.table_key(device, check.dtype, check.head_dim)
    return tables.forward_configs(*key, far=check.window.far_levels > 0)[0].name


def _on_another_stream(
    run: Callable[..., list[torch.Tensor]],
    inputs: Sequence[torch.Tensor | None],
    grad: torch.Tensor,
) -> list[torch.Tensor]:
    """`run` on copies that are not there yet when it is called; on a CPU once more."""

    def copied(x: torch.Tensor) -> torch.Tensor:
        empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return empty.copy_(x)

    device = grad.device
    if device.type != "cuda":
        return run(inputs, grad)
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LATER_CYCLES)
        found = run([None if x is None else copied(x) for x in inputs], copied(grad))
    current.wait_stream(stream)
    return found


def _check_forward(check: Check, device: torch.device) -> list[dict[str, Any]]:
    """One entry of a table: of the image's queries, or of the text's."""
    (query, key, value, _), (weight, offset) = _inputs(check, device)
    window, text, scale = check.window, check.window.text_length, check.head_dim**-0.5
    plain = plain_attention(query, key, value, weight, offset, window)
    wide = _double([weight, offset])
    scores, values = _scores(query.double(), key.double(), value.double(), *wide, window)
    exact = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    exact_lse = scores.logsumexp(-1).transpose(1, 2)
    rows = []
    if check.kind == "text":
        out = torch.full_like(query, float("nan"), memory_format=torch.contiguous_format)
        lse = torch.full(query.shape[:3], float("nan"), device=device)
        launch.text_attention(query, key, value, out, lse, text, scale, check.entry, check.programs)
        own = slice(None, text)
        untouched = bool(out[:, text:].isnan().all() and lse[:, text:].isnan().all())
        rows.append({"what": "others' rows are left alone", "ok": untouched})
    else:
        options = {"scale": scale, "spatial_weight": weight, "far_offset": offset}
        with pinned(check.entry):
            out, lse = triton_attention(query, key, value, window, **options)
        own = slice(text, None)
    rows += _compare(["output"], [out[:, own]], [plain[:, own]], [exact[:, own]], check.dtype)
    error = float((lse[:, own] - exact_lse[:, own]).abs().max())
    bound = {"bound": LSE_TOLERANCE, "ok": error <= LSE_TOLERANCE}
    return [*rows, {"what": "log-sum-exp", "error": error, **bound}]


def _check_pooling(check: Check, device: torch.device) -> list[dict[str, Any]]:
    """The cells of far keys, with learned weights and without; and the same bits again."""
    (_, *tokens, _), (weight, _) = _inputs(check, device)
    window, scale, rows = check.window, check.head_dim**-0.5, []
    image = [x[:, window.text_length :] for x in tokens]
    for learned in (weight, weight[:0]):
        inputs = [*image, learned]
        sizes = window.height, window.width, window.far_levels, scale
        ours = pool_cells(*inputs, *sizes)
        plain = pool_cells_by_operators(*inputs, *sizes)
        exact = pool_cells_by_operators(*_double(inputs), *sizes)
        rows += _compare(["cells' keys", "cells' values"], ours, plain, exact, check.dtype)
        same = all(map(torch.equal, ours, pool_cells(*inputs, *sizes)))
        rows.append({"what": "the same bits again", "ok": same})
    return rows


def _check_norm_rope(check: Check, device: torch.device) -> list[dict[str, Any]]:
    """Norm and rotation of both streams, with and without weights, forward and backward."""
    window, generator = check.window, torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, check.dtype)

    image, text = (
        random(check.batch, length, HEADS, check.head_dim)
        for length in (window.image_length, window.text_length)
    )
    angles = 100 * torch.rand(window.sequence_length, check.head_dim // 2, generator=generator)
    cos, sin = (f(angles).repeat_interleave(2, dim=1).to(device) for f in (torch.cos, torch.sin))
    grad = random(check.batch, window.sequence_length, HEADS, check.head_dim)
    rows = []
    for weighted in (True, False):
        weights = [1 + random(check.head_dim) / 2 if weighted else None for _ in range(2)]
        streams = [image, text, *weights] if window.text_length else [image, None, weights[0], None]

        def run(tokens, text, weight, text_weight):
            return norm_rope(tokens, text, weight, text_weight, cos, sin, 1e-6)

        plain = partial(plain_norm_rope, cos=cos, sin=sin)
        ours = _gradients(run, streams, grad)
        rows += _compare(
            ["output", *(f"gradient {i}" for i in range(len(ours) - 1))],
            ours,
            _gradients(plain, streams, grad),
            _gradients(plain, _double(streams), grad.double()),
            check.dtype,
        )
    return rows


def plain_norm_rope(tokens, text, weight, text_weight, cos, sin):
    """RMSNorm, joining and rotation one after the other, each rounded."""
    dtype = tokens.dtype
    cos, sin = (x[:, None].to(torch.promote_types(dtype, torch.float32)) for x in (cos, sin))
    size = tokens.shape[-1:]
    joint = torch.nn.functional.rms_norm(tokens, size, weight, 1e-6)
    if text is not None:
        joint = torch.cat([torch.nn.functional.rms_norm(text, size, text_weight, 1e-6), joint], 1)
    even, odd = joint.unflatten(-1, (-1, 2)).unbind(-1)
    return (joint * cos + torch.stack([-odd, even], -1).flatten(-2) * sin).to(dtype)


KINDS = {
    "gradients": _check_gradients,
    "forward": _check_forward,
    "text": _check_forward,
    "norm_rope": _check_norm_rope,
    "pooling": _check_pooling,
}


def launch_only(check: Check, device: torch.device) -> None:
    """What a check launches, without what it compares with: to compile it ahead."""
    (*tokens, grad), learned = _inputs(check, device)
    window, scale = check.window, check.head_dim**-0.5
    if check.kind == "norm_rope":
        _check_norm_rope(check, device)
    elif check.kind == "pooling":
        _check_pooling(check, device)
    elif check.kind == "text":
        out, lse = torch.empty_like(tokens[0]), torch.empty(tokens[0].shape[:3], device=device)
        text = window.text_length
        launch.text_attention(*tokens, out, lse, text, scale, check.entry, check.programs)
    else:

        def run(query, key, value, weight, offset):
            options = {"scale": scale, "spatial_weight": weight, "far_offset": offset}
            return triton_attention(query, key, value, window, **options)[0]

        with pinned(check.entry or _default_entry(check, device)):
            if check.kind == "gradients":
                _gradients(run, [*tokens, *learned], grad)
            else:
                run(*tokens, *learned)


@contextmanager
def poisoned() -> Iterator[None]:
    """What nobody writes is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
