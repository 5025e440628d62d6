"""Telling models apart: whether samples or a checkpoint belong to the model at hand."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
from torch import nn

from ..families.table import family_of


def fingerprint(transformer: nn.Module) -> dict[str, Any]:
    """What tells a family's transformer from others: its architecture, and the size of weights.

    Returns:
        {"architecture": a digest of its class and its parameters' names and shapes, "magnitudes":
        the mean absolute value of the matrices before and behind its blocks, which no CLEAR weights
        replace}, which `same_model` compares; the same in every dtype, up to rounding.
    """
    parameters = dict(transformer.named_parameters())
    architecture = {name: list(parameter.shape) for name, parameter in parameters.items()}
    named = json.dumps([type(transformer).__name__, architecture], sort_keys=True)
    outside = [
        parameter.detach()
        for name, parameter in parameters.items()
        if parameter.ndim > 1 and name.partition(".")[0] not in family_of(transformer).stacks
    ]
    return {
        "architecture": hashlib.sha256(named.encode()).hexdigest()[:16],
        "magnitudes": [weight.abs().mean(dtype=torch.float32).item() for weight in outside],
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
