"""QK-norm and rotary embedding, as FLUX's attention layers have them: fused where that can be."""

from __future__ import annotations

import functools
import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..compat import names_from
from ..kernels.choice import why_not_trusted
from ..kernels.triton.device import DTYPES, LARGEST_HEAD_DIM

apply_rotary_emb: Any
(apply_rotary_emb,) = names_from("diffusers.models.embeddings", "apply_rotary_emb")
DiffusersRMSNorm: Any
(DiffusersRMSNorm,) = names_from("diffusers.models.normalization", "RMSNorm")

logger: logging.Logger = logging.getLogger(__name__)

HAS_TRITON = find_spec("triton") is not None
# Device types that QK-norm and RoPE run on as one Triton kernel; ROCm's is "cuda" too, and "meta"
# has no numbers but a GPU's shapes and memory.
FUSED_DEVICES = ("cuda", "meta")
FUSED_HEAD_DIMS = range(16, LARGEST_HEAD_DIM + 1, 2)

# (cos, sin), (sequence, head_dim) each; before it is taken apart maybe with more such pairs.
Rotary = tuple[torch.Tensor, ...]


def why_not_norm_rope(
    tokens: torch.Tensor,
    norm: nn.Module | None,
    rotary: Rotary | None,
    text: torch.Tensor | None = None,
    text_norm: nn.Module | None = None,
) -> str | None:
    """Why the fused kernel cannot stand for these modules and tensors; None if it can.

    Arguments are those of `norm_and_rotate`.
    """
    if tokens.device.type not in FUSED_DEVICES:
        return f"needs a CUDA or ROCm device, got tokens on {tokens.device.type!r}"
    if not HAS_TRITON:
        return "needs Triton, which is not installed"
    head_dim = tokens.shape[-1]
    if tokens.dtype not in DTYPES:
        return f"needs float16, bfloat16 or float32, got {tokens.dtype}"
    if head_dim not in FUSED_HEAD_DIMS:
        return f"needs an even head_dim of 16 to {LARGEST_HEAD_DIM}, got {head_dim}"
    if text is not None and (text.dtype, text.device) != (tokens.dtype, tokens.device):
        return f"needs text in {tokens.dtype} on {tokens.device}, got {text.dtype} on {text.device}"
    norms: list[Any] = [norm] if text is None else [norm, text_norm]
    for each in norms:
        if reason := _why_not_norm(each, tokens):
            return reason
    if norms[0].eps != norms[-1].eps:
        return f"needs norms of one eps, got {norms[0].eps} and {norms[-1].eps}"
    shape = (tokens.shape[1] + (0 if text is None else text.shape[1]), head_dim)
    for table in rotary or ():
        if (table.shape, table.dtype, table.device) != (shape, torch.float32, tokens.device):
            return (
                f"needs rotary tables {shape} in float32 on {tokens.device}, got "
                f"{tuple(table.shape)} in {table.dtype} on {table.device}"
            )
    return why_not_trusted(tokens, ("norm_rope",))


def _why_not_norm(norm: Any, tokens: torch.Tensor) -> str | None:
    """Why calling `norm` may be anything else than RMSNorm over head_dim on the tokens' device."""
    # A subclass, a wrapper (LoRA, a parametrization) or a hook may compute something of its own.
    if type(norm) not in (nn.RMSNorm, DiffusersRMSNorm):
        return f"needs RMSNorm, got {type(norm).__name__}"
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks)
    if any(hooks) or "forward" in vars(norm):  # accelerate's and diffusers' hooks replace forward
        return "needs norms without hooks"
    if getattr(norm, "bias", None) is not None:
        return "needs norms without bias"
    shape = norm.normalized_shape if type(norm) is nn.RMSNorm else norm.dim
    if tuple(shape) != tokens.shape[-1:] or norm.eps is None:
        return f"needs norms over head_dim with an eps, got {tuple(shape)} and eps={norm.eps}"
    weight = norm.weight
    if weight is None or (weight.dtype in DTYPES and weight.device == tokens.device):
        return None
    return f"needs norm weights on {tokens.device}, got {weight.dtype} on {weight.device}"


@functools.cache
def _announce(reason: str | None) -> None:
    if reason is None:
        logger.info("QK-norm and RoPE run fused")
    else:
        logger.info("QK-norm and RoPE run one after the other; the fused kernel %s", reason)


def norm_and_rotate(
    tokens: torch.Tensor,
    norm: nn.Module | None,
    rotary: Rotary | None,
    text: torch.Tensor | None = None,
    text_norm: nn.Module | None = None,
) -> torch.Tensor:
    """Query or key as attention takes it: normed, text before image, rotated.

    One Triton kernel where it can (`why_not_norm_rope`), which rounds once; else step by step.
    What runs, and why, is logged once at INFO.

    Args:
        tokens: (batch, sequence, heads, head_dim).
        norm: of `tokens`, over head_dim; None for no norm.
        rotary: (cos, sin), (text + sequence, head_dim) each; None for no rotation.
        text: (batch, text, heads, head_dim) to be put before `tokens`.
        text_norm: of `text`; None for no norm.

    Returns:
        (batch, text + sequence, heads, head_dim).
    """
    reason = why_not_norm_rope(tokens, norm, rotary, text, text_norm)
    if not torch.compiler.is_compiling():  # a log call breaks the graph
        _announce(reason)
    if reason is None and norm is not None:
        from ..kernels.triton.norm_rope import norm_rope

        text_weight = None if text_norm is None else text_norm.weight
        cos, sin = rotary or (None, None)
        return norm_rope(tokens, text, norm.weight, text_weight, cos, sin, norm.eps)
    tokens = tokens if norm is None else norm(tokens)
    if text is not None:
        text = text if text_norm is None else text_norm(text)
        tokens = torch.cat([text, tokens], dim=1)
    return tokens if rotary is None else rotate(tokens, rotary)


def rotate(tokens: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of neighbouring channels, as FLUX has it.

    On a CPU as one complex product, which is faster than diffusers' six passes over memory.

    Args:
        tokens: (batch, sequence, heads, head_dim).
        rotary: (cos, sin), (sequence, head_dim) each, every angle in two neighbouring channels.
    """
    plain_cpu = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    if not plain_cpu or tokens.dtype == torch.float64:
        return apply_rotary_emb(tokens, rotary, sequence_dim=1)
    cos, sin = (table[:, None, ::2].float() for table in rotary)  # [sequence, 1, head_dim / 2]
    pairs = torch.view_as_complex(tokens.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(tokens.dtype)
