"""The cascade's plan: which sizes, one after the other, lead to the picture that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from .resolution import NATIVE_SLACK, Resolution, settings_for

# The noise level at which a stage starts to repaint an enlarged picture.
DEFAULT_STRENGTH = 0.55

Attention = Literal["clear", "full"]


@dataclass(frozen=True)
class Stage:
    """One picture of the cascade.

    Attributes:
        height, width: of the picture, in pixels, whole tokens.
        strength: the noise level (sigma) a stage starts at: its first latents are
            (1 - strength) enlarged picture + strength noise. 0 leaves the enlarged picture as it
            is; None in a first stage, which starts from noise and has no picture.
        attention: "clear", or "full" with the weights the model had before CLEAR's.
        resolution: what the model needs to paint at this size.
    """

    height: int
    width: int
    strength: float | None
    attention: Attention
    resolution: Resolution

    @property
    def name(self) -> str:
        """Its size, as people write it: "1024x768", width first."""
        return f"{self.width}x{self.height}"


def plan_stages(
    height: int,
    width: int,
    *,
    native_size: int,
    token_pixels: int = 16,
    text_length: int = 512,
    strength: float | Sequence[float] | None = None,
    attention: Attention = "full",
    native_attention: Attention = "full",
    pooled: bool = False,
    cascade: bool | None = None,
    image_size: tuple[int, int] | None = None,
    resolution: Callable[[int, int], Resolution] | None = None,
) -> tuple[Stage, ...]:
    """The fewest stages that lead to a picture by at most doubling, evenly spaced.

    Without an image the first stage has the aspect ratio asked for and about the native number of
    pixels, and starts from noise. Every other stage starts from the enlarged picture before it.

    Full attention is planned for stages of a cascade of about the native number of pixels
    (`NATIVE_SLACK` times at most): there it is what the model was trained with, and hardly dearer,
    as attention is the smaller part of a step (a fifth of FLUX.1-dev's FLOPs at 1024 px; the paper
    measures 4.45 s for 20 steps with it and 4.40 to 5.45 s with CLEAR). It is the published recipe
    too, whose first picture is painted by the stock model. A picture that takes one stage has the
    attention the pipeline has.

    Args:
        height, width: of the picture asked for, in pixels, multiples of `token_pixels`.
        native_size: side of a square of as many pixels as the model was trained at, in pixels.
        token_pixels: side of a token.
        text_length: text tokens the model is given.
        strength: of all stages that enlarge, or one for each; `DEFAULT_STRENGTH` where None.
        attention: what the pipeline is set to.
        native_attention: of stages of about the native number of pixels in a cascade.
        pooled: whether CLEAR's keys are followed by pooled ones.
        cascade: whether to start at the native size; None does so above `NATIVE_SLACK` times the
            native number of pixels. Without meaning where there is an image.
        image_size: (height, width) in pixels of the picture to start from, any number of pixels.
        resolution: settings for a stage's height and width, in pixels; `settings_for` where None.

    Returns:
        At least one stage; the last has the size asked for.

    Raises:
        ValueError: strength is not from 0 to 1, or not one for each stage that enlarges.
    """
    if resolution is None:
        resolution = partial(
            settings_for,
            native_size=native_size,
            text_length=text_length,
            token_pixels=token_pixels,
            local=attention == "clear" and not pooled,
        )
    target = (height // token_pixels, width // token_pixels)
    native_tokens = (native_size / token_pixels) ** 2
    most_native = NATIVE_SLACK * native_tokens
    if image_size is None:
        excess = target[0] * target[1] / native_tokens
        wanted = excess > NATIVE_SLACK if cascade is None else cascade and excess > 1
        # As few as leave at most the slack for the first stage, or one where a cascade is forced.
        doublings = max(1, math.ceil(math.log(excess / NATIVE_SLACK, 4))) if wanted else 0
        sizes = _sizes(target, max(1.0, math.sqrt(excess)), doublings)
    else:
        scale = max(height / image_size[0], width / image_size[1])
        enlargements = max(1, math.ceil(math.log2(scale) - 1e-9))
        sizes = _sizes(target, scale, enlargements)[1:]
    from_noise = 1 if image_size is None else 0
    strengths = _strengths(strength, len(sizes) - from_noise)
    planned: list[float | None] = [None] * from_noise + list(strengths)
    return tuple(
        Stage(
            rows * token_pixels,
            columns * token_pixels,
            part,
            native_attention if len(sizes) > 1 and rows * columns <= most_native else attention,
            resolution(rows * token_pixels, columns * token_pixels),
        )
        for (rows, columns), part in zip(sizes, planned, strict=True)
    )


def _sizes(target: tuple[int, int], scale: float, enlargements: int) -> list[tuple[int, int]]:
    """Sizes in tokens from 1 / scale of the target to the target, none over twice the last."""
    sizes = [target]
    for index in range(enlargements - 1, -1, -1):
        shrink = scale ** ((index - enlargements) / enlargements)
        rows, columns = (
            max(round(side * shrink), math.ceil(larger / 2))
            for side, larger in zip(target, sizes[0], strict=True)
        )
        sizes.insert(0, (rows, columns))
    return sizes


def _strengths(strength: float | Sequence[float] | None, stages: int) -> Sequence[float]:
    who = "CLEARFluxPipeline: strength"
    if isinstance(strength, Sequence):
        values = list(strength)
        if len(values) != stages:
            raise ValueError(
                f"{who} has {len(values)} values, but {stages} stages enlarge a picture; give one "
                "number, or one for each."
            )
    else:
        values = [DEFAULT_STRENGTH if strength is None else strength] * max(stages, 1)
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"{who} must be from 0 to 1, got {value}.")
    return values[:stages]
