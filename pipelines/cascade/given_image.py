"""The image a cascade is given to start from: checked, and as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..decoding.colours import to_rgb

# A smaller side shows too little of anything for a model to go by.
MIN_TOKENS = 4

_WHO = "CLEARPipeline: image"


def pixels_from(image: Any, token_pixels: int) -> list[torch.Tensor]:
    """Images as (1, 3, height, width), float32 in [-1, 1], all of one size.

    Args:
        image: a PIL image, a list of them, or a float tensor in [0, 1], (3, height, width) or
            (batch, 3, height, width). Those of PIL become sRGB, see `to_srgb`.
        token_pixels: side of a token, in pixels.

    Raises:
        ValueError: another type, an alpha channel, over 8 bits, too small, sizes that differ,
            values outside [0, 1] or not finite.
    """
    if isinstance(image, torch.Tensor):
        found = list(_checked(image).split(1))
    else:
        images = image if isinstance(image, list) else [image]
        for one in images:
            check_image(one, token_pixels)
        found = [_from_pil(to_rgb(one, _WHO)) for one in images]
    sizes = {tuple(one.shape[-2:]) for one in found}
    if len(sizes) != 1:
        listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)) or "none"
        raise ValueError(f"{_WHO}: all images must have one size, got {listed}.")
    height, width = sizes.pop()
    _check_size(height, width, token_pixels)
    return found


def check_image(image: Any, token_pixels: int) -> None:
    """Refuse a PIL image that cannot be enlarged; its pixels are not read.

    Raises:
        ValueError: another type, or too small.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"{_WHO} must be a PIL image, a list of them or a tensor, got {type(image).__name__}."
        )
    _check_size(image.height, image.width, token_pixels)


def _check_size(height: int, width: int, token_pixels: int) -> None:
    if min(height, width) < MIN_TOKENS * token_pixels:
        raise ValueError(
            f"{_WHO} must have at least {MIN_TOKENS * token_pixels} pixels a side, got "
            f"{width}x{height}."
        )


def enlarged_size(
    height: int | None, width: int | None, image_size: tuple[int, int], token_pixels: int
) -> tuple[int, int]:
    """The size asked for, or twice the image's own, to the nearest multiple of a token.

    Args:
        height, width: in pixels; where one is None it follows from the other, where both are they
            are doubled.
        image_size: (height, width) of the image, in pixels.

    Raises:
        ValueError: smaller than the image, or of another aspect ratio.
    """
    scales = [
        asked / side for asked, side in zip((height, width), image_size, strict=True) if asked
    ]
    scale = scales[0] if scales else 2.0
    natural = [max(1, round(side * scale / token_pixels)) * token_pixels for side in image_size]
    size = (height or natural[0], width or natural[1])
    own = f"{image_size[1]}x{image_size[0]}"
    if max(side - given for side, given in zip(size, image_size, strict=True)) <= -token_pixels:
        raise ValueError(
            f"{_WHO} is larger ({own}) than the image asked for ({size[1]}x{size[0]}); ask for "
            "more, or give a smaller one."
        )
    if any(abs(side - other) > token_pixels for side, other in zip(size, natural, strict=True)):
        raise ValueError(
            f"{_WHO} is {own} and the image asked for {size[1]}x{size[0]}, another aspect "
            f"ratio; ask for {natural[1]}x{natural[0]}, or crop the image."
        )
    return size


def _checked(image: torch.Tensor) -> torch.Tensor:
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim == 4 and batch.shape[1] == 4:
        raise ValueError(f"{_WHO} has an alpha channel (4 channels); give 3.")
    if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
        raise ValueError(
            f"{_WHO}: a tensor must be float, (3, height, width) or (batch, 3, height, width), got "
            f"{image.dtype}, {tuple(image.shape)}."
        )
    if not (batch.isfinite().all() and batch.min() >= 0 and batch.max() <= 1):
        raise ValueError(f"{_WHO}: the values of a tensor must be from 0 to 1.")
    return batch.float() * 2 - 1


def _from_pil(image: Image.Image) -> torch.Tensor:
    values = torch.from_numpy(np.array(image, dtype=np.float32))
    return values.permute(2, 0, 1)[None] / 127.5 - 1
