"""Telling models apart: whether samples or a checkpoint belong to the model at hand."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from torch import nn

# Layers that no CLEAR weights replace; their mean magnitude differs from model to model.
_LAYERS = ("x_embedder", "norm_out.linear", "proj_out")
_ARCHITECTURE = (
    "in_channels",
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)


def fingerprint(transformer: nn.Module) -> dict[str, Any]:
    """What tells a FLUX transformer from others: its architecture, and the size of some weights.

    Returns:
        {"architecture": a digest, "magnitudes": the mean absolute weight of three layers}, which
        `same_model` compares; the same in every dtype, up to rounding.
    """
    config: Any = transformer.config
    architecture = {name: config[name] for name in _ARCHITECTURE}
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True, default=list).encode())
    weights = [transformer.get_parameter(f"{name}.weight") for name in _LAYERS]
    return {
        "architecture": digest.hexdigest()[:16],
        "magnitudes": [weight.detach().abs().double().mean().item() for weight in weights],
    }


def same_model(one: Any, other: Any) -> bool:
    """Whether two fingerprints, at least one of them read from a file, are of one model."""
    try:
        pairs = zip(one["magnitudes"], other["magnitudes"], strict=True)
        return one["architecture"] == other["architecture"] and all(
            math.isclose(a, b, rel_tol=1e-3) for a, b in pairs
        )
    except (KeyError, TypeError, ValueError):
        return False
