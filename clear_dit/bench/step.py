"""A denoising step of a model: what it gives, whether it is right, and how it is reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..tables import table
from .timing import measured_on

# Largest relative error of what a whole transformer returns that still counts as right.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def output_of(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """What a transformer gives for the arguments of one image: Z-Image's gives a list."""
    (image,) = model(**inputs, return_dict=False)[0]
    found: torch.Tensor = image
    return found


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of what was expected."""
    return float((out - expected).float().norm() / expected.float().norm())


def verdict(error: float, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How a result ends: whether its relative error will do, and what it was measured on."""
    return {
        "max_error": error,
        "correct": error <= TOLERANCE[dtype],
        **measured_on(dtype, device),
    }


def step_report(result: dict[str, Any], conclusion: str) -> str:
    """What was measured, the table of its rows and a conclusion; of a wrong result its error."""
    if not result["correct"]:
        return f"WRONG results, relative error {result['max_error']:.1e}"
    sees = ", far keys" if result.get("far") else ""
    if result.get("quantize") is not None:
        sees += f", {result['quantize']}"
    return (
        f"{result['model']}, {result['height']} x {result['width']} px, radius {result['radius']} "
        f"tokens{sees}, {result['dtype']}, {result['hardware']}\n{table(result['rows'])}\n"
        f"{conclusion}"
    )
