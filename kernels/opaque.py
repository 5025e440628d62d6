"""Attention as an opaque operator: one registration for every implementation with own loops.

A custom op is one node to torch.compile (no graph break), runs under FakeTensor and on the meta
device, has a backward pass (a second op) and tells FlopCounterMode its exact work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from .pooling import pool_tokens
from .window import Window

# (query, key, value, pooled_key, pooled_value, geometry) -> (out, lse). And (grad, query, key,
# value, pooled_key, pooled_value, out, lse, geometry) -> the inputs' gradients, of all rows.
Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
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
    """

    height: int
    width: int
    text_length: int
    radius: int
    scale: float
    query_start: int
    query_stop: int

    @classmethod
    def of(cls, window: Window, scale: float) -> Geometry:
        """The numbers of a window."""
        size = (window.height, window.width, window.text_length)
        return cls(*size, window.disc_radius, scale, *window.image_query_rows)

    @property
    def image_queries(self) -> int:
        """Number of image tokens that are queries."""
        return (self.query_stop - self.query_start) * self.width


def attention_op(name: str, forward: Forward, backward: Backward) -> Attention:
    """Register `clear_dit::{name}_attention` and its backward op; returns what calls the former.

    An operator takes the numbers of a `Geometry` one by one; its backward one those up to the
    scale. Pooled key and value are (batch, pooled, heads, head_dim), empty without pooling; lse is
    float32 or wider.

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
        height: int,
        width: int,
        text_length: int,
        radius: int,
        scale: float,
        query_start: int,
        query_stop: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        geometry = Geometry(height, width, text_length, radius, scale, query_start, query_stop)
        return forward(query, key, value, pooled_key, pooled_value, geometry)

    def run_backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pooled_key: torch.Tensor,
        pooled_value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        height: int,
        width: int,
        text_length: int,
        radius: int,
        scale: float,
    ) -> Gradients:
        geometry = Geometry(height, width, text_length, radius, scale, 0, height)
        return backward(grad, query, key, value, pooled_key, pooled_value, out, lse, geometry)

    op = torch.library.custom_op(f"clear_dit::{name}_attention", run_forward, mutates_args=())
    backward_op = torch.library.custom_op(
        f"clear_dit::{name}_attention_backward", run_backward, mutates_args=()
    )
    op.register_fake(_fake)
    backward_op.register_fake(_fake_backward)

    def differentiate(ctx: Any, grad: torch.Tensor, grad_lse: torch.Tensor | None) -> tuple:
        grads = backward_op(grad, *ctx.saved_tensors, *ctx.geometry)
        return *grads, *(None for _ in Geometry._fields)

    op.register_autograd(differentiate, setup_context=_save)
    operators = torch.ops.clear_dit
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
        return_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if window.down_factor > 1:
            pooled_key = pool_tokens(key, window, spatial_weight)
            pooled_value = pool_tokens(value, window, spatial_weight)
        else:
            pooled_key = pooled_value = key.new_empty(key.shape[0], 0, *key.shape[2:])
        return op(query, key, value, pooled_key, pooled_value, *Geometry.of(window, scale))

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


def _fake_backward(grad, query, key, value, pooled_key, pooled_value, *rest):
    contiguous = torch.contiguous_format
    return tuple(
        torch.empty_like(x, memory_format=contiguous)
        for x in (query, key, value, pooled_key, pooled_value)
    )


def _save(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.geometry = inputs[5:10]


def _product_flops(query, pooled, window: Window) -> int:
    """FLOPs of one of attention's products: 2 per attended pair and channel, exact pairs."""
    batch, _, heads, head_dim = query
    image_queries = window.query_length - window.text_query_length
    pairs = window.attended_pairs() + image_queries * pooled[1]
    return 2 * batch * heads * head_dim * pairs


def _flops(query, key, value, pooled_key, pooled_value, *geometry, **_):
    height, width, text_length, radius, _, *rows = geometry
    query_rows = None if query[1] == key[1] else (rows[0], rows[1])
    window = Window(height, width, text_length, radius, query_rows=query_rows)
    return 2 * _product_flops(query, pooled_key, window)


def _backward_flops(grad, query, key, value, pooled_key, pooled_value, out, lse, *geometry, **_):
    # The scores again, then the gradients of probability, value, query and key.
    return 5 * _product_flops(query, pooled_key, Window(*geometry[:4]))
