"""Forwards of full attention's own trajectories: what a model is given at every noise level."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
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


class Trajectory:
    """The forwards of one image, and which of them stand for every interval of noise levels.

    Args:
        forwards: of every step.
        intervals: of noise levels, of as many steps each.
        points: forwards that stand for an interval.
    """

    def __init__(self, forwards: Sequence[ForwardOf], intervals: int, points: int) -> None:
        self.forwards = forwards
        bounds = np.linspace(0, len(forwards), intervals + 1).round().astype(int)
        self.intervals: list[Sequence[ForwardOf]] = [
            forwards[start:stop] for start, stop in itertools.pairwise(bounds)
        ]
        # Evenly within each interval, at the middle of as many parts.
        self.points: list[list[ForwardOf]] = [
            [part[int((place + 0.5) * len(part) / points)] for place in range(points)]
            for part in self.intervals
        ]

    @property
    def levels(self) -> tuple[float, ...]:
        """Between the intervals: the middle of the neighbours' noise levels."""
        pairs_of = zip(self.intervals, self.intervals[1:], strict=False)
        return tuple(round((one[-1].level + two[0].level) / 2, 4) for one, two in pairs_of)

    @property
    def shares(self) -> list[float]:
        """Of the steps in every interval."""
        return [len(part) / len(self.forwards) for part in self.intervals]


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
