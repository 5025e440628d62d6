"""How far a student's prediction is from the teacher's at the same point of the same path.

The measure that distillation's output term lowers: x_t = (1 - s) x_0 + s noise, x_0 the teacher's
own final latents, s the noise level; mean over LEVELS, images and their values of
(student(x_t) - teacher(x_t))^2. One pass, with the prompt; no second pass for guidance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..files import whole_file
from ..generation.conditioning import conditioning_of, moved, stacked
from ..progress import bar_options
from .images import BROKEN, ImageSet
from .request import EvaluateRequest
from .variants import TextCache

if TYPE_CHECKING:
    from ..pipelines.pipeline import CLEARPipeline

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
# Of so many first images; each adds len(LEVELS) predictions to every variant's work.
IMAGES = 16
FILE = "output_mse.json"


@dataclass(frozen=True)
class Point:
    """Where predictions are compared: one image's path, at all LEVELS.

    Attributes:
        prompt: of the image.
        latents: x_0, the teacher's final latents, as the denoising loop holds them.
        seed: of the noise; differs from those of the images.
    """

    prompt: str
    latents: torch.Tensor
    seed: int

    def noisy(self) -> torch.Tensor:
        """x_t at all levels, float32 (levels, *latents); the noise differs by level."""
        generator = torch.Generator().manual_seed(self.seed)
        clean = self.latents.float()
        noise = torch.randn(len(LEVELS), *clean.shape, generator=generator)
        level = torch.tensor(LEVELS).reshape(-1, *[1] * clean.ndim)
        return (1 - level) * clean + level * noise


def make_points(request: EvaluateRequest, teacher: ImageSet) -> list[Point]:
    """The points of the first images of the teacher, which are generated already."""
    count = min(IMAGES, len(request.prompts))
    # A stream of their own: the initial noise of image i is that of seed + i.
    seeds = [(request.generation.seed + index) ^ 0x5EED << 32 for index in range(count)]
    return [Point(request.prompts[i], teacher.latents(i), seeds[i]) for i in range(count)]


@torch.no_grad()
def predict(
    pipe: CLEARPipeline, request: EvaluateRequest, point: Point, texts: TextCache
) -> torch.Tensor:
    """The transformer's prediction (noise - x_0) at all LEVELS of a point.

    Returns:
        float32 on the CPU, (levels, *latents).
    """
    generation, denoiser = request.generation, pipe.recipe.denoiser
    conditioning = conditioning_of(
        pipe,
        point.prompt,
        height=generation.height,
        width=generation.width,
        guidance=generation.guidance,
        texts=texts,
    )
    conditioning = moved(conditioning, pipe.device, pipe.dtype)
    predictions = []
    noisy = point.noisy().to(pipe.device, pipe.dtype)
    levels = torch.tensor(LEVELS, device=pipe.device)
    for first in range(0, len(LEVELS), request.batch):
        some = slice(first, first + request.batch)
        arguments = denoiser.arguments(
            noisy[some], levels[some], stacked([conditioning] * len(levels[some]))
        )
        output = pipe.transformer(**arguments, return_dict=False)[0]
        predictions.append(denoiser.velocity(output, point.latents.shape).float().cpu())
    return torch.cat(predictions)


def predict_all(
    pipe: CLEARPipeline,
    request: EvaluateRequest,
    points: Sequence[Point],
    texts: TextCache,
    progress: bool = True,
) -> list[torch.Tensor]:
    """`predict` at every point."""
    bar = tqdm(points, "predictions", unit="image", **bar_options(progress))
    return [predict(pipe, request, point, texts) for point in bar]


def mean_squared_error(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]) -> float:
    """The mean over all values of equally shaped predictions, in float64."""
    pairs = zip(teacher, student, strict=True)
    errors = [(a.double() - b.double()).square().mean() for a, b in pairs]
    return float(torch.stack(errors).mean())


def question(request: EvaluateRequest, points: Sequence[Point], teacher: str, student: str) -> str:
    """A digest of all that the value depends on; teacher and student are fingerprints."""
    digest = hashlib.sha256(json.dumps([teacher, student, LEVELS]).encode())
    digest.update(f"{request.generation.guidance} {request.generation.dtype}".encode())
    for point in points:
        digest.update(f"{point.prompt} {point.seed} {tuple(point.latents.shape)}".encode())
        digest.update(point.latents.float().numpy().tobytes())
    return digest.hexdigest()


def read_value(folder: Path, asked: str) -> float | None:
    """The value an earlier run found in a variant's folder, if it answers the same question."""
    try:
        found = json.loads((folder / FILE).read_text())
        return float(found["value"]) if found["question"] == asked else None
    except (*BROKEN, TypeError):
        return None


def write_value(folder: Path, asked: str, value: float) -> None:
    """Keep a value for the next run.

    Raises:
        OSError: it cannot be written; nothing is left under its name.
    """
    with whole_file(folder / FILE) as file:
        file.write(json.dumps({"question": asked, "value": value}).encode())
