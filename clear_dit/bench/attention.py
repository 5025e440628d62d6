"""Local attention against its peers on one layer: correct first, then timed.

FLOPs counted are those the method needs (`Window.attention_flops`: 4 per attended pair and
channel), for every row: a dense implementation does more, and its useful rate is that much lower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..errors import RequestError
from ..generation.checks import find_impl
from ..generation.models import TOKEN_PIXELS
from ..kernels.attention import local_attention
from ..kernels.choice import IMPLS, why_not
from ..kernels.pooling import pooled_bias, pooled_keys
from ..kernels.tiled import bands
from ..kernels.triton.device import kernels_of
from ..kernels.window import Window
from ..memory import peak_mb, reset_peak
from ..tables import table
from .peers import PEERS, Peer, Sees, raster_pairs, sees_window, triton_pairs
from .timing import measured_on, time_in_turn

# Full attention by PyTorch's scaled_dot_product_attention: the peer that CLEAR replaces.
DENSE = "sdpa"
# Largest relative error that still counts as right: some five times that of right results in half
# precision. A row that misses one tile of 64 of 3700 keys is off by a tenth.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}
# Of a log-sum-exp, which is float32 whatever the inputs; that tile moves it by 0.017.
LSE_TOLERANCE = 1e-3
# How much larger the errors of image queries may be where their pooled keys are rounded too.
POOLED_ROUNDING = 3
CHECKED_QUERIES = 192
# Rows and columns of the grid on which gradients are checked.
SMALL_GRID = (16, 32)


@dataclass(frozen=True)
class Problem:
    """One attention layer, batch 1."""

    window: Window
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def setting(self) -> dict[str, Any]:
        """What was measured, for a report; height and width in pixels."""
        return {
            "height": self.window.height * TOKEN_PIXELS,
            "width": self.window.width * TOKEN_PIXELS,
            "radius": self.window.radius,
            "down_factor": self.window.down_factor,
            "far": self.window.far_levels > 0,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "text_length": self.window.text_length,
            **measured_on(self.dtype, self.device),
        }

    def tensors(self, seed: int = 0) -> list[torch.Tensor]:
        """Random query, key, value: (1, text + image, heads, head_dim)."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (1, self.window.sequence_length, self.heads, self.head_dim)
        return [
            torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
            for _ in range(3)
        ]


class SampledErrors(NamedTuple):
    """How far a sample of queries is from float64.

    Attributes:
        text_error, image_error: of text and image queries apart, for their results differ in size:
            the largest norm of a difference, of one query and head, over the root mean square of
            the exact results' norms; None where there are no such queries.
        lse_error: the largest difference of a log-sum-exp; None where there is none.
    """

    text_error: float | None
    image_error: float | None
    lse_error: float | None = None

    def right(self, dtype: torch.dtype, pooled: bool = False) -> bool:
        """Whether all that is known is within its tolerance; NaN is not.

        pooled: there are pooled keys, which in half precision are rounded before they are used.
        """
        rounded = POOLED_ROUNDING if pooled and dtype.itemsize < 4 else 1
        most = TOLERANCE[dtype], TOLERANCE[dtype] * rounded, LSE_TOLERANCE * rounded
        return all(error is None or error <= bound for error, bound in zip(self, most, strict=True))

    def __str__(self) -> str:
        names = ("text rows", "image rows", "log-sum-exp")
        known = [pair for pair in zip(names, self, strict=True) if pair[1] is not None]
        return ", ".join(f"{name} {error:.1e}" for name, error in known)


def bench_attention(
    problem: Problem, impls: Sequence[str], repeats: int, backward: bool = False
) -> dict[str, Any]:
    """Check every implementation against its own definition in float64, then time them in turn.

    Args:
        impls: names of IMPLS or PEERS.
        backward: time the backward pass too, of those that have one: forward and backward
            together, less the forward. The gradients are checked on a small problem.

    Returns:
        rows with impl, ms, useful_tflops, executed_over_exact, text_error, image_error, lse_error;
        on a CUDA device peak_mb, what the forward pass takes beyond query, key and value; with
        `backward` also backward_ms and gradient_error; and the setting. A row with an error above
        its tolerance has no time, and `correct` is False.

    Raises:
        RequestError: an implementation that is unknown or cannot run here.
    """
    window, device = problem.window, problem.device
    tensors = problem.tensors()
    peers = dict(_find_peer(impl, tensors[0], window) for impl in impls)
    trials = {name: _check(name, peer, problem, tensors, backward) for name, peer in peers.items()}
    right = {name: trial for name, trial in trials.items() if trial.right}
    seconds = time_in_turn({name: trial.forward for name, trial in right.items()}, repeats, device)
    total = time_in_turn(
        {name: trial.both for name, trial in right.items() if trial.both}, repeats, device
    )
    flops = window.attention_flops(problem.heads, problem.head_dim)
    for name, time in seconds.items():
        trials[name].row.update(ms=time * 1e3, useful_tflops=flops / time / 1e12)
    for name, time in total.items():
        trials[name].row["backward_ms"] = (time - seconds[name]) * 1e3
    return {
        "rows": [trial.row for trial in trials.values()],
        "correct": len(right) == len(trials),
        **problem.setting,
        "dense_over_exact_flops": window.sequence_length**2 / window.attended_pairs(),
    }


def report(result: dict[str, Any]) -> str:
    """The table of a result, and how many times faster each row is than dense attention."""
    rows = result["rows"]
    dense = next((row["ms"] for row in rows if row["impl"] == DENSE), None)
    if dense is not None:
        rows = [row | {"speedup": dense / row["ms"] if row["ms"] else None} for row in rows]
    lines = [
        f"{result['height']} x {result['width']} px, radius {result['radius']} tokens"
        f"{', far keys' if result['far'] else ''}, "
        f"{result['heads']} x {result['head_dim']}, {result['text_length']} text tokens, "
        f"{result['dtype']}, {result['hardware']}",
        table(rows),
        f"full attention needs {result['dense_over_exact_flops']:.1f} times the FLOPs",
    ]
    lines += [
        f"{row['impl']}: WRONG, errors: {errors_of(row)}"
        + (f", of gradients {row['gradient_error']:.1e}" if row.get("gradient_error") else "")
        + "; not timed"
        for row in rows
        if row["ms"] is None
    ]
    return "\n".join(lines)


def errors_of(row: dict[str, Any]) -> SampledErrors:
    """Of a row of a result."""
    return SampledErrors(*(row[name] for name in SampledErrors._fields))


def _find_peer(impl: str, query: torch.Tensor, window: Window) -> tuple[str, Peer]:
    """An implementation by name, "auto" under the name of what runs."""
    if impl in PEERS:
        if reason := PEERS[impl].why_not(query, window, False):
            raise RequestError(f"--impls: {impl!r} cannot run here: it {reason}.")
        return impl, PEERS[impl]
    if impl not in IMPLS:
        known = ", ".join(dict.fromkeys((DENSE, *IMPLS, *PEERS)))
        raise RequestError(f"--impls must be of {known}; got {impl!r}.")
    kernels = kernels_of(window.far_levels > 0, window.down_factor > 1, needs_grad=False)
    name = find_impl(impl, query.dtype, query.device, query.shape[-1], kernels)
    return name, _local_peer(name)


@functools.cache
def _local_peer(name: str) -> Peer:
    """One of CLEAR's own implementations."""
    return Peer(
        why_not=lambda query, window, needs_grad: why_not(name, query, needs_grad),
        run=lambda *inputs: local_attention(*inputs, impl=name),  # type: ignore[arg-type]
        sees=sees_window,
        executed_pairs=_EXECUTED_PAIRS[name],
        find_lse=partial(local_lse, name),
    )


def local_lse(
    impl: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: Window
) -> torch.Tensor | None:
    """The log-sum-exp of one of CLEAR's own implementations, where it returns one."""
    if why_not(impl, query, return_lse=True):
        return None
    return local_attention(query, key, value, window, impl=impl, return_lse=True)[1]


def _masked_pairs(query: torch.Tensor, window: Window) -> int:
    return window.sequence_length * (window.sequence_length + window.pooled_length)


_EXECUTED_PAIRS: dict[str, Callable[[torch.Tensor, Window], float]] = {
    "triton": triton_pairs,
    "flex": raster_pairs,
    "tiled": bands.executed_pairs,
    "reference": _masked_pairs,
}


def _ordered(peer: Peer, tensors: Sequence[torch.Tensor], window: Window) -> list[torch.Tensor]:
    """Query, key and value as the peer takes them."""
    if peer.order is None:
        return list(tensors)
    order = peer.order(window).to(tensors[0].device)
    return [x[:, order] for x in tensors]


def _restored(peer: Peer, out: torch.Tensor, window: Window) -> torch.Tensor:
    """What a peer returns, (1, tokens, ...), text first and then the image in raster order."""
    if peer.order is None:
        return out
    return out[:, peer.order(window).argsort().to(out.device)]


@dataclass(frozen=True)
class _Trial:
    """An implementation that was run: what is known of it, and what is left to time."""

    row: dict[str, Any]
    right: bool
    forward: Callable[[], torch.Tensor]
    both: Callable[[], tuple[torch.Tensor, ...]] | None


def _check(
    name: str, peer: Peer, problem: Problem, tensors: Sequence[torch.Tensor], backward: bool
) -> _Trial:
    window = problem.window
    query, key, value = _ordered(peer, tensors, window)
    forward = partial(peer.run, query, key, value, window)
    both = None
    reset_peak(problem.device)
    before = peak_mb(problem.device)
    out = forward()
    row: dict[str, Any] = {
        "impl": name,
        "ms": None,
        "useful_tflops": None,
        "executed_over_exact": peer.executed_pairs(query, window) / window.attended_pairs(),
    }
    if problem.device.type == "cuda":
        row["peak_mb"] = peak_mb(problem.device) - before
    lse = peer.find_lse(query, key, value, window) if peer.find_lse else None
    errors = sampled_errors(
        _restored(peer, out, window),
        tensors,
        window,
        peer.sees,
        None if lse is None else _restored(peer, lse, window),
    )
    row |= errors._asdict()
    right = errors.right(problem.dtype, window.pooled_length > 0)
    if backward:
        row |= {"backward_ms": None, "gradient_error": None}
        if peer.why_not(query, window, True) is None:
            row["gradient_error"] = gradient_error(peer, problem)
            right = right and row["gradient_error"] <= TOLERANCE[problem.dtype]
            both = partial(_forward_and_backward, peer, (query, key, value), window)
    return _Trial(row, right, forward, both)


def _forward_and_backward(
    peer: Peer, inputs: Sequence[torch.Tensor], window: Window
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value, of half the sum of the output's squares."""
    query, key, value = (x.detach().requires_grad_() for x in inputs)
    out = peer.run(query, key, value, window)
    return torch.autograd.grad(out, (query, key, value), out.detach())


def gradient_error(peer: Peer, problem: Problem) -> float:
    """Largest relative error of the gradients of query, key and value, on a small problem.

    Against dense masked attention in float32, on the same rounded inputs. The kind of problem is
    looked at once.
    """
    small = small_window(problem.window)
    return _gradient_error(peer, small, problem.head_dim, problem.dtype, problem.device)


def small_window(window: Window) -> Window:
    """On the grid on which gradients are checked, of the same kind."""
    rows, columns = SMALL_GRID
    down_factor, levels = 2 if window.down_factor > 1 else 1, window.far_levels
    return Window(rows, columns, 20, 5, down_factor, far_levels=levels)


@functools.cache
def _gradient_error(
    peer: Peer, window: Window, head_dim: int, dtype: torch.dtype, device: torch.device
) -> float:
    small = Problem(window, 2, head_dim, dtype, device)
    exact = Peer(peer.why_not, partial(_masked_attention, sees=peer.sees), peer.sees, _masked_pairs)
    tensors = small.tensors()
    truth = _forward_and_backward(exact, [x.float() for x in tensors], window)
    ours = _forward_and_backward(peer, _ordered(peer, tensors, window), window)
    errors = [
        (_restored(peer, grad, window) - true).norm() / true.norm()
        for grad, true in zip(ours, truth, strict=True)
    ]
    return float(torch.stack(errors).max())  # NaN if one is


def _masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: Window, sees: Sees
) -> torch.Tensor:
    """Dense attention under a peer's own mask."""
    key, value, bias = _all_keys(key, value, window)
    seen = sees(window, torch.arange(window.sequence_length, device=query.device))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    scores = scores + bias.T[:, None]
    probability = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probability, value)


def _all_keys(
    key: torch.Tensor, value: torch.Tensor, window: Window
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Key and value with pooled ones behind them, and what is added to scores: (keys, heads)."""
    pooled = pooled_keys(key, value, window, None, key.shape[-1] ** -0.5)
    key, value = (torch.cat([x, part], dim=1) for x, part in zip((key, value), pooled, strict=True))
    bias = pooled_bias(window, key.shape[2], None, key.device)
    return key, value, F.pad(bias, (0, 0, key.shape[1] - len(bias), 0))


def _sampled_queries(window: Window) -> torch.Tensor:
    """Queries to check: text, the four corners and borders of the image, and some at random."""
    rows, columns, text = window.height, window.width, window.text_length
    generator = torch.Generator().manual_seed(0)
    inside = torch.randint(0, rows * columns, (CHECKED_QUERIES,), generator=generator)
    corners = torch.tensor([0, columns - 1, (rows - 1) * columns, rows * columns - 1])
    border = torch.tensor([columns // 2, (rows // 2) * columns, (rows // 2 + 1) * columns - 1])
    words = torch.arange(0, text, max(1, text // 8))
    return torch.cat([words, text + torch.cat([corners, border, inside])]).unique()


def sampled_errors(
    out: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    window: Window,
    sees: Sees = sees_window,
    lse: torch.Tensor | None = None,
) -> SampledErrors:
    """How far a result is from a float64 computation, over a sample of queries.

    Args:
        out: (1, text + image, heads, head_dim), computed from the query, key, value in `tensors`.
        sees: who attends to whom; see `Peer`.
        lse: natural-log log-sum-exp of the scaled scores, (1, text + image, heads), if known.
    """
    # On the device if it knows float64: an image of 8192 px is too much for a CPU.
    device = out.device if out.device.type == "cuda" else torch.device("cpu")
    queries = _sampled_queries(window).to(device)
    seen = sees(window, queries)
    query, key, value = (x.to(device) for x in tensors)
    bias = key.new_zeros(key.shape[1], key.shape[2])
    if window.pooled_length:
        key, value, bias = _all_keys(key.double(), value.double(), window)
    differences, exact_norms, lse_errors = [], [], []
    for head in range(query.shape[2]):  # one after the other, for memory
        q, k, v = query[0, queries, head].double(), key[0, :, head], value[0, :, head]
        scores = q @ k.double().T * query.shape[-1] ** -0.5 + bias[:, head]
        scores = scores.masked_fill_(~seen, float("-inf"))
        exact = scores.softmax(-1) @ v.double()
        differences.append((out[0, queries, head].to(device) - exact).norm(dim=-1))
        exact_norms.append(exact.norm(dim=-1))
        if lse is not None:
            found = lse[0, queries, head].to(device)
            lse_errors.append((found - scores.logsumexp(-1)).abs().max())
    difference, exact_norm = torch.stack(differences), torch.stack(exact_norms)
    of_text = queries < window.text_length
    text, image = (
        float(difference[:, rows].max() / exact_norm[:, rows].square().mean().sqrt())
        if rows.any()
        else None
        for rows in (of_text, ~of_text)
    )
    # Maxima are NaN if one is.
    return SampledErrors(text, image, float(torch.stack(lse_errors).max()) if lse_errors else None)
