"""From what a visitor entered to requests that are within the server's bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import RequestError
from ..generation.checks import MAX_SIDE
from ..generation.models import find_model
from ..generation.prompts import check_prompt
from ..generation.request import GenerateRequest, make_request
from ..kernels.numbers import as_integer, as_number
from .settings import MAX_FULL_PIXELS, MAX_PROMPT, MAX_STEPS, Settings

ATTENTIONS = ("clear", "full", "both")
# What the page calls them: down_factor and far.
VARIANTS = {
    "Auto": (1, None),
    "Sees all": (1, True),
    "Local only": (1, False),
    "Pooled by 2": (2, None),
    "Pooled by 4": (4, None),
}
SIDES = (512, 1024, 2048, 4096, 8192)
SHAPES = {
    "Square 1:1": (1, 1),
    "Landscape 3:2": (3, 2),
    "Landscape 16:9": (16, 9),
    "Panorama 2:1": (2, 1),
    "Portrait 2:3": (2, 3),
    "Portrait 9:16": (9, 16),
}


@dataclass(frozen=True)
class Entry:
    """What a visitor entered, nothing of it checked.

    Attributes:
        prompt: what to generate.
        width, height: in pixels, whole tokens of the model.
        attention: "clear", "full" or "both", which generates the image twice.
        radius: of the window, in tokens.
        down_factor: side of a pooling cell, in tokens; 1 for none.
        far: whether to see the whole image by far keys; None as the weights were made for.
        steps, guidance, seed, model: see `GenerateRequest`.
    """

    prompt: Any
    width: Any
    height: Any
    attention: Any
    radius: Any
    down_factor: Any
    far: Any
    steps: Any
    guidance: Any
    seed: Any
    model: Any


def make_requests(
    entry: Entry, settings: Settings, image: str | None = None
) -> tuple[GenerateRequest, ...]:
    """One request, or with "both" that of CLEAR and that of full attention.

    Args:
        entry: what was entered.
        settings: of the server.
        image: the file of an image to enlarge; it has been checked.

    Raises:
        RequestError: the first thing that is wrong or out of bounds, in words for the visitor.
    """
    text = entry.prompt
    prompt = check_prompt(" ".join(text.split()) if isinstance(text, str) else text, "Prompt")
    if len(prompt) > MAX_PROMPT:
        raise RequestError(
            f"Prompt: at most {MAX_PROMPT} characters are read here, got {len(prompt)}."
        )
    if entry.attention not in ATTENTIONS:
        raise RequestError(f"Attention must be {', '.join(ATTENTIONS)}; got {entry.attention!r}.")
    if entry.model not in settings.models:
        raise RequestError(f"Model must be one of {', '.join(settings.models)}.")
    if entry.far is not None and not isinstance(entry.far, bool):
        raise RequestError(f"Far must be true, false or null; got {entry.far!r}.")
    step = find_model(entry.model).side_pixels
    width, height = (
        _side(name, value, step)
        for name, value in (("Width", entry.width), ("Height", entry.height))
    )
    if width * height > settings.max_pixels:
        raise RequestError(
            f"{width} × {height} px are {width * height:,} pixels; this server generates at most "
            f"{settings.max_pixels:,}."
        )
    if entry.attention != "clear" and width * height > MAX_FULL_PIXELS:
        raise RequestError(
            f"Full attention is offered up to {MAX_FULL_PIXELS:,} pixels (its time grows with "
            f"their square), got {width * height:,}; choose CLEAR or a smaller image."
        )
    try:
        request = make_request(
            prompt,
            entry.model,
            width=width,
            height=height,
            radius=_whole("Radius", entry.radius, 1, 512),
            down_factor=_whole("Pooling", entry.down_factor, 1, 64),
            far=entry.far,
            steps=_whole("Steps", entry.steps, 1, MAX_STEPS),
            guidance=_number("Guidance", entry.guidance, 0, 100),
            seed=_whole("Seed", entry.seed, 0, 2**53 - 1),
            image=image,
            upscaler=settings.upscaler,
            attention="full" if entry.attention == "full" else "clear",
            dtype=settings.dtype,
            quantize=settings.quantize,
            offload=settings.offload,
            device=settings.device,
        )
    except RequestError as error:
        raise RequestError(str(error).replace("--", "")) from error
    if entry.attention != "both":
        return (request,)
    return (request, replace(request, attention="full"))


def preset_size(side: int, shape: str, step: int) -> tuple[int, int]:
    """Width and height of a shape whose longer side is given, multiples of a step, in pixels."""
    across, down = SHAPES[shape]
    scale = side / max(across, down)
    width, height = (max(1, round(part * scale / step)) * step for part in (across, down))
    return width, height


def _side(name: str, value: Any, step: int) -> int:
    pixels = _whole(name, value, step, MAX_SIDE)
    if pixels % step:
        lower = pixels // step * step
        raise RequestError(
            f"{name} must be a multiple of {step} pixels, got {pixels}; the nearest are "
            f"{lower} and {lower + step}."
        )
    return pixels


def _whole(name: str, value: Any, least: int, most: int) -> int:
    number = as_integer(_number(name, value, least, most))
    if number is None:
        raise RequestError(f"{name} must be a whole number, got {value}.")
    return number


def _number(name: str, value: Any, least: float, most: float) -> float:
    number = as_number(value)
    if number is None:
        raise RequestError(f"{name} must be a number, got {value!r}.")
    if not least <= number <= most:
        raise RequestError(f"{name} must be from {least} to {most}, got {number}.")
    return number
