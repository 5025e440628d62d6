"""Local attention against its peers on one layer: correct first, then timed.

FLOPs counted are those the method needs (`Window.attention_flops`: 4 per attended pair and
channel), for every row: a dense implementation does more, and its useful rate is that much lower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..checks import find_impl
from ..errors import RequestError
from ..kernels import flex, tiles
from ..kernels.attention import IMPLS, local_attention
from ..kernels.pooling import pool_tokens
from ..kernels.window import Window
from ..models import TOKEN_PIXELS
from .timing import hardware, table, time_in_turn

# Full attention by PyTorch's scaled_dot_product_attention: the peer that CLEAR replaces.
DENSE = "sdpa"
# Largest error against float64 that still counts as right, for values of unit variance: some ten
# roundings of a value of size four. A wrong mask is off by tenths.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
CHECKED_QUERIES = 192


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
            "heads": self.heads,
            "head_dim": self.head_dim,
            "text_length": self.window.text_length,
            "dtype": str(self.dtype).removeprefix("torch."),
            "hardware": hardware(self.device),
            "torch": torch.__version__,
        }

    def tensors(self, seed: int = 0) -> list[torch.Tensor]:
        """Random query, key, value: (1, text + image, heads, head_dim)."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (1, self.window.sequence_length, self.heads, self.head_dim)
        return [
            torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
            for _ in range(3)
        ]


def bench_attention(problem: Problem, impls: Sequence[str], repeats: int) -> dict[str, Any]:
    """Check every implementation against float64 on a sample of queries, then time them in turn.

    Returns:
        rows with impl, ms, useful_tflops, executed_over_exact, max_error; and the setting. A row
        whose error is above TOLERANCE has no time, and `correct` is False.

    Raises:
        RequestError: an implementation that is unknown or cannot run here.
    """
    window = problem.window
    query, key, value = tensors = problem.tensors()
    runs: dict[str, Callable[[], Any]] = {}
    for impl in impls:
        if impl == DENSE:
            runs[DENSE] = partial(_dense, query, key, value)
        elif impl not in IMPLS:
            known = ", ".join((DENSE, *IMPLS))
            raise RequestError(f"--impls must be of {known}; got {impl!r}.")
        else:
            name = find_impl(impl, problem.dtype, problem.device)
            runs[name] = partial(local_attention, query, key, value, window, impl=name)

    errors = {
        name: sampled_error(run(), tensors, window, dense=name == DENSE)
        for name, run in runs.items()
    }
    right = {name: run for name, run in runs.items() if errors[name] <= TOLERANCE[problem.dtype]}
    seconds = time_in_turn(right, repeats, problem.device)
    flops = window.attention_flops(problem.heads, problem.head_dim)
    rows = [
        {
            "impl": impl,
            "ms": seconds[impl] * 1e3 if impl in seconds else None,
            "useful_tflops": flops / seconds[impl] / 1e12 if impl in seconds else None,
            "executed_over_exact": _executed_over_exact(impl, window),
            "max_error": errors[impl],
        }
        for impl in runs
    ]
    return {
        "rows": rows,
        "correct": len(right) == len(runs),
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
        f"{result['height']} x {result['width']} px, radius {result['radius']} tokens, "
        f"{result['heads']} x {result['head_dim']}, {result['text_length']} text tokens, "
        f"{result['dtype']}, {result['hardware']}",
        table(rows),
        f"full attention needs {result['dense_over_exact_flops']:.1f} times the FLOPs",
    ]
    lines += [
        f"{row['impl']}: WRONG, error {row['max_error']:.1e}; not timed"
        for row in rows
        if row["ms"] is None
    ]
    return "\n".join(lines)


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _sampled_queries(window: Window) -> torch.Tensor:
    """Queries to check: text, the four corners and borders of the picture, and some at random."""
    rows, columns, text = window.height, window.width, window.text_length
    generator = torch.Generator().manual_seed(0)
    inside = torch.randint(0, rows * columns, (CHECKED_QUERIES,), generator=generator)
    corners = torch.tensor([0, columns - 1, (rows - 1) * columns, rows * columns - 1])
    border = torch.tensor([columns // 2, (rows // 2) * columns, (rows // 2 + 1) * columns - 1])
    words = torch.arange(0, text, max(1, text // 8))
    return torch.cat([words, text + torch.cat([corners, border, inside])]).unique()


def sampled_error(
    out: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    window: Window,
    dense: bool = False,
) -> float:
    """Largest difference from a float64 computation, over a sample of queries.

    Args:
        out: (1, text + image, heads, head_dim), computed from the query, key, value in `tensors`.
        dense: it is full attention, with no window.
    """
    query, key, value = (x.double().cpu() for x in tensors)
    text, total = window.text_length, window.sequence_length
    if window.down_factor > 1 and not dense:
        key = torch.cat([key, pool_tokens(key, window, None)], dim=1)
        value = torch.cat([value, pool_tokens(value, window, None)], dim=1)
    y = torch.arange(window.height).repeat_interleave(window.width)
    x = torch.arange(window.width).repeat(window.height)
    worst = 0.0
    for token in _sampled_queries(window).tolist():
        seen = torch.ones(key.shape[1], dtype=torch.bool)
        if not dense:
            if token < text:
                seen[total:] = False
            else:
                dy, dx = y - y[token - text], x - x[token - text]
                seen[text:total] = dy**2 + dx**2 < window.radius**2
        scores = torch.einsum("hd,khd->hk", query[0, token], key[0, seen])
        scores = scores * query.shape[-1] ** -0.5
        exact = torch.einsum("hk,khd->hd", scores.softmax(-1), value[0, seen])
        worst = max(worst, float((out[0, token].double().cpu() - exact).abs().max()))
    return worst


def _executed_over_exact(impl: str, window: Window) -> float | None:
    exact = window.attended_pairs()
    if impl == "tiled":
        return tiles.executed_pairs(window) / exact
    if impl == "flex":
        return flex.executed_pairs(window) / exact
    dense = window.sequence_length * (window.sequence_length + window.pooled_length)
    return dense / exact if impl in (DENSE, "reference") else None
