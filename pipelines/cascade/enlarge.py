"""Enlarging an image for the stage that repaints it.

Where nobody names an upscaler it is Lanczos' filter, and nothing else. On the demo, scenes of its
world at 256 px, enlarged to 512 px and repainted there (strength 0.2, one step, its native size and
so full attention, float32), the mean of four held-out ones: PSNR of the result, scaled down, to the
smaller image; gradient energy against its Lanczos enlargement; PSNR to the scene drawn at 512 px:

    bicubic                                   31.89 dB 0.517  31.21 dB
    Lanczos                                   31.90 dB 0.520  31.22 dB
    and noise of 4 levels of 255              31.90 dB 0.519  31.22 dB
    and noise of 12 levels                    31.88 dB 0.514  31.21 dB
    and noise of 24 levels                    31.80 dB 0.503  31.14 dB
    and noise, half the contrast around       31.89 dB 0.517  31.21 dB
    and noise, the contrast around            31.88 dB 0.511  31.20 dB
    and noise in the latents, 0.15            31.86 dB 0.518  31.18 dB
    and noise in the latents, 0.3             31.69 dB 0.513  31.03 dB
    and an unsharp mask (1 pixel) of 0.7      31.94 dB 0.540  31.25 dB
    and an unsharp mask of 1.5                31.96 dB 0.563  31.26 dB
    and an unsharp mask of 3                  31.88 dB 0.603  31.18 dB

All noise was without the frequencies that the smaller image has. It helped nowhere, nor on two
scenes at strength 0.12 (Lanczos 32.17 dB 0.476 31.44 dB, 12 levels 32.15 dB 0.470 31.42 dB), nor
with three steps from 0.2 (31.73 dB 0.472 31.06 dB, 31.72 dB 0.467 31.05 dB): the autoencoder takes
it away, and in the latents it bent edges and put out stars. An unsharp mask gains
less than can be seen, and adds up: after three enlargements, not repainted between, an edge of
height 1 overshoots by 0.11 without, 0.26 with 0.7, and 0.5 (all there is room for) with 1.5. At
1024 px with radius 8, two generated and two drawn images, bicubic and Lanczos came within 0.01 dB
and 1%. Other strengths and models, and networks that enlarge, were not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

# (1, 3, height, width), float32 in [0, 1], to the same but larger.
Enlarger = Callable[[torch.Tensor], torch.Tensor]

_WHO = "CLEARPipeline: upscaler"


def enlarge(
    pixels: torch.Tensor, height: int, width: int, upscaler: Enlarger | None = None
) -> torch.Tensor:
    """An image at the size of the stage that repaints it.

    Args:
        pixels: (1, 3, rows, columns), any float dtype, in [-1, 1] but for overshoot.
        height, width: to enlarge it to, in pixels.
        upscaler: enlarges it first, by any factor; only this module's own filter where None.

    Returns:
        (1, 3, height, width), float32 in [-1, 1], on the device of `pixels`.

    Raises:
        ValueError: what the upscaler returned is no such image, not larger, of another aspect
            ratio or not finite.
    """
    pixels = pixels.float()
    if upscaler is not None:
        given = ((pixels + 1) / 2).clamp(0, 1)
        larger = upscaler(given)
        check_enlarged(larger, given)
        pixels = larger.to(pixels).clamp(0, 1) * 2 - 1
    return lanczos(pixels, height, width).clamp_(-1, 1)


def check_enlarged(larger: Any, given: torch.Tensor) -> None:
    """Refuse what an upscaler returned, where it is no enlarged image.

    Args:
        larger: what it returned.
        given: the image it was given, (1, 3, height, width).

    Raises:
        ValueError: what is wrong.
    """
    height, width = given.shape[-2:]
    if not isinstance(larger, torch.Tensor) or not larger.is_floating_point():
        kind = larger.dtype if isinstance(larger, torch.Tensor) else type(larger).__name__
        raise ValueError(f"{_WHO} must return a float tensor, got {kind}.")
    if larger.ndim != 4 or larger.shape[:2] != given.shape[:2]:
        raise ValueError(
            f"{_WHO} must return (1, 3, height, width), got {tuple(larger.shape)} for "
            f"{tuple(given.shape)}."
        )
    rows, columns = larger.shape[-2:]
    got = f"made {columns}x{rows} of {width}x{height} pixels"
    if rows <= height or columns <= width:
        raise ValueError(f"{_WHO} must enlarge; it {got}.")
    # To the pixel, where its factor is not whole.
    if abs(rows * width - columns * height) >= max(width, height):
        raise ValueError(f"{_WHO} must keep the aspect ratio; it {got}.")
    if not larger.isfinite().all():
        raise ValueError(f"{_WHO} returned NaN or infinite values.")


def lanczos(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """An image (1, channels, rows, columns) at another size, by Pillow's Lanczos filter.

    Smaller, it is smoothed as well. Float32; computed on the CPU, where Pillow is exact and quick.
    """
    planes = np.empty((image.shape[1], height, width), np.float32)
    for plane, given in zip(planes, image[0].float().cpu().numpy(), strict=True):
        larger = Image.fromarray(given).resize((width, height), Image.Resampling.LANCZOS)
        plane[:] = np.asarray(larger)
    return torch.from_numpy(planes)[None].to(image.device)
