"""A denoising step of a model: what it is given, whether it is right, and how it is reported."""

from __future__ import annotations

from typing import Any

import torch

from .timing import measured_on, table

# Largest relative error of what a whole transformer returns that still counts as right.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def step_inputs(
    pipe: Any, rows: int, columns: int, text_length: int, device: torch.device | str | None = None
) -> dict[str, torch.Tensor | None]:
    """What a transformer is given in a step: random latents and text; sizes in tokens.

    On the pipeline's device or another: "meta" has no numbers.
    """
    config, dtype = pipe.transformer.config, pipe.transformer.dtype
    device = pipe.device if device is None else device
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        if str(device) == "meta":
            return torch.empty(*shape, device=device, dtype=dtype)
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return {
        "hidden_states": noise(1, rows * columns, config.in_channels),
        "encoder_hidden_states": noise(1, text_length, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], device=device, dtype=dtype),
        "guidance": torch.tensor([3.5], device=device) if config.guidance_embeds else None,
        "img_ids": pipe._prepare_latent_image_ids(1, rows, columns, device, dtype),
        "txt_ids": torch.zeros(text_length, 3, device=device),
    }


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
    return (
        f"{result['model']}, {result['height']} x {result['width']} px, radius {result['radius']} "
        f"tokens{sees}, {result['dtype']}, {result['hardware']}\n{table(result['rows'])}\n"
        f"{conclusion}"
    )
