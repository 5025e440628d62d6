"""A small image of what is being generated, from the latents of a step."""

from __future__ import annotations

import base64
import io
import time
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch.nn.functional import interpolate

from ..generation.denoising import unpack

if TYPE_CHECKING:
    from ..generation.runner import Step

# The longer side, in latent pixels; 8 times as many of the image's.
MAX_SIDE = 48
# Previews may take one in so many seconds.
SHARE = 10.0


class Previewer:
    """Previews of one image, as the model expects it to become.

    With the noise levels s and s' of two steps and their latents x and x', the flow points to
    x - s (x - x') / (s - s'): the sample a straight path ends at (arXiv 2209.03003).

    Args:
        pipe: that generates it; used in the generating thread, between two steps.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._before: tuple[int, float, torch.Tensor] | None = None
        self._next = 0.0

    @torch.no_grad()
    def after(self, step: Step) -> str | None:
        """A JPEG as a data URL; None after a stage's first step, and where previews would take
        more than their share of the time.
        """
        before, self._before = self._before, (step.stage, step.sigma, step.latents.clone())
        start = time.monotonic()
        if start < self._next or before is None or before[0] != step.stage:
            return None
        direction = (step.latents - before[2]) / (step.sigma - before[1])
        latents = step.latents - step.sigma * direction
        url = self._decode(latents, step.height, step.width)
        now = time.monotonic()
        self._next = now + SHARE * (now - start)
        return url

    def _decode(self, latents: torch.Tensor, height: int, width: int) -> str:
        from ..pipelines.decoding.autoencoder import decode
        from ..pipelines.decoding.colours import srgb_profile
        from ..pipelines.decoding.image_files import to_bytes

        pipe = self._pipe
        grid = unpack(pipe, latents, height, width)
        rows, columns = grid.shape[-2:]
        shrink = min(1.0, MAX_SIDE / max(rows, columns))
        size = (max(2, round(rows * shrink)), max(2, round(columns * shrink)))
        small = interpolate(grid.float(), size, mode="area").to(grid.dtype)
        pixels = to_bytes(decode(pipe.vae, small))[0].permute(1, 2, 0).numpy()
        file = io.BytesIO()
        image = Image.fromarray(pixels).convert("RGB")  # without the alpha of Qwen-Image 2.1
        image.save(file, "JPEG", quality=80, icc_profile=srgb_profile())
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
