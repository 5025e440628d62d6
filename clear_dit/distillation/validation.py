"""Images generated while training, from the same prompts and seeds each time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..generation.conditioning import record
from ..generation.denoising import decode, in_calls
from ..generation.image_output import save_png
from ..generation.models import OF_TEXTS
from ..generation.prompts import read_prompts
from ..pipelines.text import Texts
from .precision import autocast
from .sample import DEMO_PROMPTS, denoise_as_trained
from .samples import SampleIndex

if TYPE_CHECKING:
    from ..pipelines.pipeline import CLEARPipeline

COUNT = 4


def validation_prompts(source: str) -> list[str]:
    """The first prompts of a file, or captions of the demo's held-out combinations.

    Raises:
        RequestError: see `read_prompts`.
    """
    if source != DEMO_PROMPTS:
        return read_prompts(source, COUNT)
    from ..demo.captions import caption
    from ..demo.probe import held_out_scenes

    return [caption(scene) for scene in held_out_scenes(COUNT)]


class Validator:
    """Generates a few images with whatever the pipeline's transformer has become.

    Args:
        pipe: whole; its text encoders are used here and then dropped.
        prompts: what to generate.
        index: size, steps and guidance are those of the samples.
        dtype: of the computation.
        folder: where the images go, as PNG files.
    """

    def __init__(
        self,
        pipe: CLEARPipeline,
        prompts: list[str],
        index: SampleIndex,
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self.pipe = pipe
        self.prompts = prompts
        self.index = index
        self.folder = folder
        self.dtype = dtype
        pipe.set_progress_bar_config(disable=True)
        self.texts: Texts = Texts()
        size = {"height": index.height, "width": index.width}
        with autocast(dtype, pipe.device):
            for some in in_calls(pipe, prompts):
                record(pipe, some, guidance=index.guidance, texts=self.texts, **size)
        for part in pipe.components:
            if part.startswith(OF_TEXTS):
                setattr(pipe, part, None)

    def generate(self) -> list[Any]:
        """PIL images, one of each prompt."""
        index = self.index
        seeds = list(range(len(self.prompts)))
        with autocast(self.dtype, self.pipe.device):
            latents = denoise_as_trained(self.pipe, self.prompts, seeds, index, self.texts)
        latents = latents.to(self.pipe.vae.dtype)
        return [decode(self.pipe, each[None], index.height, index.width) for each in latents]

    def run(self, step: int, trackers: list[Any], save: bool) -> None:
        """Generate; if asked, save as `step-{step}-{i}.png` and show to the trackers.

        Raises:
            OSError: an image cannot be written.
        """
        images = self.generate()
        if not save:
            return
        self.folder.mkdir(exist_ok=True)
        for i, (image, prompt) in enumerate(zip(images, self.prompts, strict=True)):
            path = self.folder / f"step-{step:06d}-{i}.png"
            save_png(image, path, {"prompt": prompt, "seed": i, "step": step})
        pixels = np.stack([np.asarray(image) for image in images])  # [n, height, width, 3]
        for tracker in trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": pixels}, step=step, **layout)
