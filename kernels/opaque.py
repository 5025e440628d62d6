"""Attention as an opaque operator: one registration for every implementation with own loops.

A custom op is one node to torch.compile (no graph break), runs under FakeTensor and on the meta
device, has a backward pass (a second op) and tells FlopCounterMode its exact work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from .cells import cell_count, rows_in_reach
from .namespace import NAMESPACE
from .pooling import pooled_bias, pooled_keys
from .window import Window

# (query, key, value, pooled_key, pooled_value, bias, geometry) -> (out, lse). And (grad, query,
# key, value, pooled_key, pooled_value, bias, out, lse, geometry) -> gradients of the six inputs.
Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Gradients = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]
Backward = Callable[..., Gradients]
# The arguments of `local_attention` -> (out, lse).
Attention = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Geometry(NamedTuple):
    """A window as the kernels take it, and the scale of scores: what an operator is given of it.

    Attributes:
        height, width, text_length: in tokens, see `Window`.
        radius: in tokens, `Window.disc_radius`.
        scale: factor on query times key.
        query_start, query_stop: first row of image queries, and the row after the last.
        far_levels: levels of far keys; with 0 the pooled keys, if any, are seen by every image
            query.
        key_rows: `Window.key_rows` one number after the other; empty where all keys are given.
    """

    height: int
    width: int
    text_length: int
    radius: int
    scale: float
    query_start: int
    query_stop: int
    far_levels: int = 0
    key_rows: tuple[int, ...] = ()

    @classmethod
    def of(cls, window: Window, scale: float) -> Geometry:
        """The numbers of a window."""
        size = (window.height, window.width, window.text_length)
        rows = tuple(row for rows in window.key_rows or () for row in rows)
        return cls(
            *size, window.disc_radius, scale, *window.image_query_rows, window.far_levels, rows
        )

    @property
    def image_queries(self) -> int:
        """Number of image tokens that are queries."""
        return (self.query_stop - self.query_start) * self.width

    def given_rows(self, level: int) -> tuple[int, int]:
        """Rows of a level's cells (of tokens, for level 0) that are among the keys."""
        if self.key_rows:
            return self.key_rows[2 * level], self.key_rows[2 * level + 1]
        return 0, cell_count(self.height, level)

    def rows_in_reach(self, level: int, rows: range) -> range:
        """Of the given rows of a level those that queries of some rows may see; maybe none."""
        found = rows_in_reach(self.height, self.radius, self.far_levels, level, rows)
        start, stop = self.given_rows(level)
        return range(max(found.start, start), max(min(found.stop, stop), found.start, start))

    def first_cell(self, level: int) -> int:
        """Place of a level's first given cell among the pooled keys."""
        first = 0
        for below in range(1, level):
            start, stop = self.given_rows(below)
            first += (stop - start) * cell_count(self.width, below)
        return first


def attention_op(name: str, forward: Forward, backward: Backward) -> Attention:
    """Register the operator `{name}_attention` and its backward op; returns what calls the former.

    An operator takes the numbers of a `Geometry` one by one. Key and value have the query's heads
    or fewer (see groups.py), pooled ones as many: (batch, pooled, key heads, head_dim), empty
    without pooling. What is added to the latter's scores belongs to the query's heads: float32
    (pooled, heads), any strides, or (0, heads) where it is nothing; lse is float32 or wider. A
    query that sees none of the given keys has output 0, and -inf (or a number as good as it) for
    its lse.

    Returns:
        A function of the arguments of `local_attention`. It returns (out, lse), whether or not
        `return_lse` asks for both; only `out` carries gradients.
    """

    def run_forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pooled_key: torch.Tensor,
        pooled_value: torch.Tensor,
        bias: torch.Tensor,
        height: int,
        width: int,
        text_length: int,
        radius: int,
        scale: float,
        query_start: int,
        query_stop: int,
        far_levels: int,
        key_rows: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        geometry = Geometry(
            height, width, text_length, radius, scale, query_start, query_stop, far_levels,
            tuple(key_rows),
        )  # fmt: skip
        return forward(query, key, value, pooled_key, pooled_value, bias, geometry)

    def run_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pooled_key: torch.Tensor,
        pooled_value: torch.Tensor,
        bias: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        height: int,
        width: int,
        text_length: int,
        radius: int,
        scale: float,
        far_levels: int,
    ) -> Gradients:
        geometry = Geometry(height, width, text_length, radius, scale, 0, height, far_levels)
        return backward(grad, query, key, value, pooled_key, pooled_value, bias, out, lse, geometry)

    op = torch.library.custom_op(f"{NAMESPACE}::{name}_attention", run_forward, mutates_args=())
    backward_op = torch.library.custom_op(
        f"{NAMESPACE}::{name}_attention_backward", run_backward, mutates_args=()
    )
    op.register_fake(_fake)
    backward_op.register_fake(_fake_backward)

    def differentiate(ctx: Any, grad: torch.Tensor, grad_lse: torch.Tensor | None) -> tuple:
        grads = backward_op(grad, *ctx.saved_tensors, *ctx.geometry)
        return *grads, *(None for _ in Geometry._fields)

    op.register_autograd(differentiate, setup_context=_save)
    operators = getattr(torch.ops, NAMESPACE)
    register_flop_formula(getattr(operators, f"{name}_attention"))(_flops)
    register_flop_formula(getattr(operators, f"{name}_attention_backward"))(_backward_flops)

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: Window,
        *,
        scale: float,
        spatial_weight: torch.Tensor | None = None,
        far_offset: torch.Tensor | None = None,
        pooled: tuple[torch.Tensor, torch.Tensor] | None = None,
        return_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if pooled is None:
            pooled = pooled_keys(key, value, window, spatial_weight, scale)
        bias = pooled_bias(window, query.shape[2], far_offset, query.device)
        return op(query, key, value, *pooled, bias, *Geometry.of(window, scale))

    return attend


def channels_contiguous(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies of those whose head_dim has another stride than 1: no kernel reads them otherwise."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _fake(query, *rest):
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        query.new_empty(query.shape[:-1], dtype=lse_dtype),
    )


def _fake_backward(grad, query, key, value, pooled_key, pooled_value, bias, *rest):
    contiguous = torch.contiguous_format
    return tuple(
        torch.empty_like(x, memory_format=contiguous)
        for x in (query, key, value, pooled_key, pooled_value, bias)
    )


def _save(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    height, width, text_length, radius, scale, _, _, far_levels, _ = inputs[6:]
    ctx.geometry = height, width, text_length, radius, scale, far_levels


def _product_flops(query, pooled, window: Window) -> int:
    """FLOPs of one of attention's products: 2 per attended pair and channel, exact pairs."""
    batch, _, heads, head_dim = query
    pairs = window.attended_pairs()
    if not window.far_levels:  # pooled keys, which all image queries see
        pairs += (window.query_length - window.text_query_length) * pooled[1]
    return 2 * batch * heads * head_dim * pairs


def _flops(query, key, value, pooled_key, pooled_value, bias, *geometry, **_):
    height, width, text_length, radius, _, start, stop, far_levels, rows = geometry
    some = query[1] == (stop - start) * width  # without text there is no difference
    window = Window(
        height, width, text_length, radius,
        query_rows=(start, stop) if some else None,
        far_levels=far_levels,
        key_rows=tuple(zip(rows[::2], rows[1::2], strict=True)) or None,
    )  # fmt: skip
    return 2 * _product_flops(query, pooled_key, window)


def _backward_flops(grad, query, key, value, pooled_key, *rest, **_):
    # The scores again, then the gradients of probability, value, query and key.
    height, width, text_length, radius, _, far_levels = rest[-6:]
    window = Window(height, width, text_length, radius, far_levels=far_levels)
    return 5 * _product_flops(query, pooled_key, window)
