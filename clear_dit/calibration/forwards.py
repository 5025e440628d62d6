"""Forwards of full attention's own trajectories: what a model is given at every noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..families.table import family_of, transformer_of
from ..generation.denoising import denoise

if TYPE_CHECKING:
    from ..generation.request import GenerateRequest
    from ..pipelines.pipeline import CLEARPipeline


@dataclass(frozen=True)
class ForwardOf:
    """A forward of a denoising step.

    Attributes:
        level: noise level, from 1 (noise) to 0 (the image).
        given: its arguments, by name.
    """

    level: float
    given: dict[str, Any]


def forwards_of(
    pipe: CLEARPipeline, request: GenerateRequest, prompt: str, seed: int
) -> tuple[list[ForwardOf], torch.Tensor]:
    """The first forward of every step of an image, and the final latents.

    With guidance in two passes a step has two forwards, of which the first is taken.

    Args:
        pipe: whose attention is what it is.
        request: size, steps and guidance.
    """
    model: nn.Module = transformer_of(pipe, "calibrate")
    denoiser = family_of(model).recipe.denoiser
    found: list[ForwardOf] = []

    def record(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        level = float(denoiser.levels(torch.as_tensor(given[denoiser.time]).float()).flatten()[0])
        if not found or level < found[-1].level:
            found.append(ForwardOf(level, dict(given)))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        latents = denoise(
            pipe,
            [prompt],
            [seed],
            height=request.height,
            width=request.width,
            steps=request.steps,
            guidance=request.guidance,
            cascade=False,
        )
    finally:
        handle.remove()
    return found, latents


@torch.no_grad()
def predicted(model: Any, forward: ForwardOf) -> torch.Tensor:
    """What a model predicts in a forward, float32."""
    denoiser, given = family_of(model).recipe.denoiser, forward.given | {"return_dict": False}
    latents = given[denoiser.latents]
    shape: Sequence[int] = latents.shape[1:] if isinstance(latents, torch.Tensor) else ()
    return denoiser.velocity(model(**given)[0], shape).float()


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Squared error, relative to the expected squares."""
    wide = expected.double()
    return float((value.double() - wide).square().sum() / wide.square().sum())
