"""QK-norm, rotary embedding and the joining of text and image in one pass over memory.

RMSNorm (arXiv 1910.07467), then the rotary embedding of neighbouring channels (arXiv 2104.09864) as
FLUX has it, in float32 from load to store. A program takes one token and a block of its heads, so
that its row of the rotary tables is read once. Forward and backward are custom ops.

Importing this module imports Triton. CPU tensors run in Triton's interpreter only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..namespace import NAMESPACE
from .device import DTYPES

# Values of a program's tile: 32 per thread of 4 warps.
TILE = 4096
# Multiply-add in one instruction: Triton's default up to 3.9, chosen here on purpose.
OPTIONS: dict[str, int] = {"num_warps": 4, "enable_fp_fusion": True}
# Programs whose sums make a weight's gradient; a fixed number, so that the sum is deterministic.
WEIGHT_PARTIALS = 1024


@triton.jit
def locate(item, tokens, heads, BLOCK_HEADS: tl.constexpr):
    """Batch, token and heads [BLOCK_HEADS] of a work item, int64: offsets pass 2^31 at 8K px."""
    blocks = tl.cdiv(heads, BLOCK_HEADS)
    place = item // blocks
    head = (item % blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    return (place // tokens).to(tl.int64), (place % tokens).to(tl.int64), head.to(tl.int64)


@triton.jit
def turn_pairs(tile, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(a, b) -> (-b, a) in every two neighbouring channels; the adjoint is its negative."""
    even, odd = tl.split(tl.reshape(tile, (ROWS, CHANNELS // 2, 2)))
    return tl.reshape(tl.join(-odd, even), (ROWS, CHANNELS))


@triton.jit
def inverse_rms(tile, eps, HEAD_DIM: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of each row, [rows, 1]; padding channels are zero."""
    return tl.rsqrt(tl.sum(tile * tile, axis=1, keep_dims=True) * (1.0 / HEAD_DIM) + eps)


@triton.jit
def norm_rope_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tokens,
    heads,
    x_batch,
    x_token,
    x_head,
    out_batch,
    out_token,
    out_head,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """out = rotate(x / rms(x) * weight); a pointer that is None leaves its step out."""
    batch, token, head = locate(tl.program_id(0), tokens, heads, BLOCK_HEADS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    real = channel < HEAD_DIM
    mask = (head < heads)[:, None] & real[None, :]
    x_at = batch * x_batch + token * x_token + head[:, None] * x_head + channel[None, :]
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_HEADS, BLOCK_CHANNELS]
    x *= inverse_rms(x, eps, HEAD_DIM)
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    if cos_ptr is not None:
        cos = tl.load(cos_ptr + token * HEAD_DIM + channel, mask=real, other=0.0)
        sin = tl.load(sin_ptr + token * HEAD_DIM + channel, mask=real, other=0.0)
        x = x * cos[None, :] + turn_pairs(x, BLOCK_HEADS, BLOCK_CHANNELS) * sin[None, :]
    out_at = batch * out_batch + token * out_token + head[:, None] * out_head + channel[None, :]
    tl.store(out_ptr + out_at, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_rope_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    grad_x_ptr,
    grad_weight_ptr,
    items,
    tokens,
    heads,
    grad_batch,
    grad_token,
    grad_head,
    x_batch,
    x_token,
    x_head,
    grad_x_batch,
    grad_x_token,
    grad_x_head,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Gradients of x and, summed over this program's items, of the weight: a row of (programs, D).

    With n = x / rms(x) and g the gradient of n: grad x = (g - n * mean(g * n)) / rms(x).
    """
    channel = tl.arange(0, BLOCK_CHANNELS)
    real = channel < HEAD_DIM
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)[None, :]
        weight_sum = tl.zeros((BLOCK_HEADS, BLOCK_CHANNELS), dtype=tl.float32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        batch, token, head = locate(item, tokens, heads, BLOCK_HEADS)
        mask = (head < heads)[:, None] & real[None, :]
        at = batch * grad_batch + token * grad_token + head[:, None] * grad_head + channel[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if cos_ptr is not None:
            cos = tl.load(cos_ptr + token * HEAD_DIM + channel, mask=real, other=0.0)
            sin = tl.load(sin_ptr + token * HEAD_DIM + channel, mask=real, other=0.0)
            turned = turn_pairs(grad * sin[None, :], BLOCK_HEADS, BLOCK_CHANNELS)
            grad = grad * cos[None, :] - turned
        at = batch * x_batch + token * x_token + head[:, None] * x_head + channel[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        inverse = inverse_rms(x, eps, HEAD_DIM)
        normed = x * inverse
        if weight_ptr is not None:
            weight_sum += grad * normed
            grad *= weight
        along = tl.sum(grad * normed, axis=1, keep_dims=True) * (1.0 / HEAD_DIM)
        grad = (grad - normed * along) * inverse
        at = batch * grad_x_batch + token * grad_x_token + head[:, None] * grad_x_head
        at += channel[None, :]
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if weight_ptr is not None:
        row = tl.program_id(0) * HEAD_DIM + channel
        tl.store(grad_weight_ptr + row, tl.sum(weight_sum, axis=0), mask=real)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides, but channels side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _blocks(head_dim: int, heads: int) -> dict[str, int]:
    """A tile that holds all heads of a token, or as many as fit."""
    channels = triton.next_power_of_2(head_dim)
    rows = min(triton.next_power_of_2(heads), max(1, TILE // channels))
    return {"HEAD_DIM": head_dim, "BLOCK_HEADS": rows, "BLOCK_CHANNELS": channels}


def _items(x: torch.Tensor, blocks: dict[str, int]) -> int:
    batch, tokens, heads, _ = x.shape
    return batch * tokens * triton.cdiv(heads, blocks["BLOCK_HEADS"])


class Stream(NamedTuple):
    """One of the two streams, and what the joint sequence has of it."""

    x: torch.Tensor  # (batch, tokens, heads, head_dim)
    weight: torch.Tensor | None  # (head_dim,)
    cos: torch.Tensor | None  # (tokens, head_dim), contiguous, as sin
    sin: torch.Tensor | None
    joint: torch.Tensor  # (batch, tokens, heads, head_dim), a view of the output or its gradient


def streams(
    tokens: torch.Tensor,
    text: torch.Tensor | None,
    weight: torch.Tensor | None,
    text_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    joint: torch.Tensor,
) -> list[Stream]:
    """The image stream and, if there is one, the text stream."""
    length = 0 if text is None else text.shape[1]

    def stream(x: torch.Tensor, weight: torch.Tensor | None, rows: slice) -> Stream:
        cosines, sines = (
            None if table is None else table[rows].contiguous() for table in (cos, sin)
        )
        weight = None if weight is None else weight.contiguous()
        return Stream(_readable(x), weight, cosines, sines, joint[:, rows])

    image = stream(tokens, weight, slice(length, None))
    return [image] if text is None else [image, stream(text, text_weight, slice(length))]


def run_forward(stream: Stream, eps: float) -> None:
    """Norm and rotate a stream into its part of the joint sequence."""
    x, weight, cos, sin, out = stream
    if not x.numel():
        return
    _, tokens, heads, head_dim = x.shape
    blocks = _blocks(head_dim, heads)
    norm_rope_kernel[(_items(x, blocks),)](
        x, weight, cos, sin, out, tokens, heads, *x.stride()[:3], *out.stride()[:3],
        eps, **blocks, **OPTIONS,
    )  # fmt: skip


def run_backward(stream: Stream, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a stream's tokens and weight; the latter is empty if there is no weight."""
    x, weight, cos, sin, grad = stream
    _, tokens, heads, head_dim = x.shape
    blocks = _blocks(head_dim, heads)
    items = _items(x, blocks)
    programs = min(items, WEIGHT_PARTIALS)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    partials = None if weight is None else x.new_empty(programs, head_dim, dtype=torch.float32)
    if items:
        norm_rope_backward_kernel[(programs,)](
            grad, x, weight, cos, sin, grad_x, partials, items, tokens, heads,
            *grad.stride()[:3], *x.stride()[:3], *grad_x.stride()[:3],
            eps, **blocks, **OPTIONS,
        )  # fmt: skip
    if weight is None or partials is None:
        return grad_x, x.new_empty(0)
    return grad_x, partials.sum(dim=0).to(weight.dtype)


def _check(
    tokens: torch.Tensor,
    text: torch.Tensor | None,
    weight: torch.Tensor | None,
    text_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> None:
    """Refuse what the kernels, which follow pointers, would misread.

    Raises:
        ValueError: see the messages.
    """
    if tokens.device.type != "cuda" and isinstance(norm_rope_kernel, triton.JITFunction):
        raise ValueError(
            f"norm_rope: needs a CUDA or ROCm device, got tokens on {tokens.device.type!r}."
        )
    if tokens.ndim != 4 or tokens.dtype not in DTYPES:
        raise ValueError(
            "norm_rope: tokens must be (batch, sequence, heads, head_dim) and float16, bfloat16 or "
            f"float32, got {tuple(tokens.shape)} and {tokens.dtype}."
        )
    batch, sequence, heads, head_dim = tokens.shape
    length = 0 if text is None else text.shape[1]
    if text is not None and text.dtype != tokens.dtype:
        raise ValueError(f"norm_rope: text must be {tokens.dtype}, got {text.dtype}.")
    for name, tensor, shape in (
        ("text", text, (batch, length, heads, head_dim)),
        ("weight", weight, (head_dim,)),
        ("text_weight", text_weight, (head_dim,)),
        ("cos", cos, (length + sequence, head_dim)),
        ("sin", sin, (length + sequence, head_dim)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.device != tokens.device):
            raise ValueError(
                f"norm_rope: {name} must be {shape} on {tokens.device}, got "
                f"{tuple(tensor.shape)} on {tensor.device}."
            )
    if text is None and text_weight is not None:
        raise ValueError("norm_rope: text_weight needs text.")
    if (cos is None) != (sin is None) or (cos is not None and head_dim % 2):
        raise ValueError("norm_rope: rotation needs both cos and sin, and an even head_dim.")


@torch.library.custom_op(f"{NAMESPACE}::norm_rope", mutates_args=())
def norm_rope(
    tokens: torch.Tensor,
    text: torch.Tensor | None,
    weight: torch.Tensor | None,
    text_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """RMSNorm over head_dim, then rotary embedding, of text and image tokens written as one.

    What `torch.nn.RMSNorm`, `torch.cat` and diffusers' `apply_rotary_emb` compute one after the
    other, computed in float32 and rounded once. Differentiable in tokens, text and the weights.

    Args:
        tokens: (batch, image, heads, head_dim), float16, bfloat16 or float32, any strides.
        text: (batch, text, heads, head_dim), dtype of `tokens`, any strides; None for one stream.
        weight: of the norm of `tokens`, (head_dim,); None for a norm without weight.
        text_weight: of the norm of `text`, (head_dim,) or None.
        cos, sin: (text + image, head_dim), float32, every angle in two neighbouring channels;
            both None for the norm alone. They carry no gradient.
        eps: added to the mean of squares, by both norms.

    Returns:
        (batch, text + image, heads, head_dim), contiguous, dtype of `tokens` whatever the weights'.

    Raises:
        ValueError: shapes or dtypes that contradict each other, a CPU tensor.
    """
    _check(tokens, text, weight, text_weight, cos, sin)
    out = _joint_like(tokens, text)
    with torch.cuda.device_of(tokens):
        for stream in streams(tokens, text, weight, text_weight, cos, sin, out):
            run_forward(stream, eps)
    return out


def _joint_like(tokens: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
    batch, sequence, heads, head_dim = tokens.shape
    return tokens.new_empty(
        batch, sequence + (0 if text is None else text.shape[1]), heads, head_dim
    )


@norm_rope.register_fake
def _(tokens, text, weight, text_weight, cos, sin, eps):
    return _joint_like(tokens, text)


@torch.library.custom_op(f"{NAMESPACE}::norm_rope_backward", mutates_args=())
def norm_rope_backward(
    grad: torch.Tensor,
    tokens: torch.Tensor,
    text: torch.Tensor | None,
    weight: torch.Tensor | None,
    text_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of tokens, text and their weights; empty for what is None.

    Args:
        grad: of `norm_rope`'s output, (batch, text + image, heads, head_dim), any strides.
        tokens, text, weight, text_weight, cos, sin, eps: those of `norm_rope`.

    Raises:
        ValueError: see `norm_rope`.
    """
    _check(tokens, text, weight, text_weight, cos, sin)
    both = streams(tokens, text, weight, text_weight, cos, sin, _readable(grad))
    with torch.cuda.device_of(tokens):
        grad_tokens, grad_weight, *of_text = (
            grad for stream in both for grad in run_backward(stream, eps)
        )
    grad_text, grad_text_weight = of_text or (tokens.new_empty(0), tokens.new_empty(0))
    return grad_tokens, grad_text, grad_weight, grad_text_weight


@norm_rope_backward.register_fake
def _(grad, tokens, text, weight, text_weight, cos, sin, eps):
    return tuple(
        tokens.new_empty(0)
        if x is None
        else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (tokens, text, weight, text_weight)
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    inputs = ctx.saved_tensors
    grads = norm_rope_backward(grad, *inputs, ctx.eps)
    needed = (None if x is None else g for x, g in zip(inputs[:4], grads, strict=True))
    return *needed, None, None, None


norm_rope.register_autograd(_backward, setup_context=_setup_context)
