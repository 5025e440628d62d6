"""What to calibrate: the request and its checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..generation.checks import find_window, take_numbers, takes_far
from ..generation.models import find_model
from ..generation.prompts import read_prompts
from ..generation.request import GenerateRequest, make_request
from ..kernels.window import Window

# Radii that are tried, in tokens; of these the ones within SPREAD of the uniform window's.
RADII = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64)
SPREAD = 4
MAX_COUNT = 1000


@dataclass(frozen=True)
class CalibrateRequest:
    """What to calibrate, complete and checked.

    Attributes:
        generation: model, size, steps, guidance, seed, dtype and device of the trajectories; its
            radius is the uniform window's.
        far: whether with far keys.
        prompts: of the trajectories that are measured, and after them those that only check.
        check: how many of the latter.
        budget: FLOPs of attention, 1 for as many as the uniform window takes.
        intervals: of noise levels.
        points: forwards measured in each, of every trajectory.

    Raises:
        RequestError: the first thing that is wrong.
    """

    generation: GenerateRequest
    far: bool
    prompts: tuple[str, ...]
    check: int
    budget: float
    intervals: int
    points: int

    def __post_init__(self) -> None:
        bounds = {"budget": (0.1, 100.0), "intervals": (1, 64), "points": (1, 1000)}
        take_numbers(self, {name: (least, most) for name, (least, most) in bounds.items()})
        if self.intervals * self.points > self.generation.steps:
            raise RequestError(
                f"--intervals {self.intervals} of --points {self.points} forwards need as many "
                f"--steps, got {self.generation.steps}."
            )
        if len(self.prompts) <= self.check:
            raise RequestError(f"--count must be more than the {self.check} prompts of the check.")

    @property
    def window(self) -> Window:
        """The uniform window, without text."""
        generation = self.generation
        return find_window(
            generation.height,
            generation.width,
            generation.radius,
            token_pixels=find_model(generation.model).token_pixels,
            far=self.far,
        )

    @property
    def radii(self) -> list[int]:
        """That are tried, besides seeing everything: none that covers the image."""
        window, base = self.window, self.generation.radius
        diagonal2 = (window.height - 1) ** 2 + (window.width - 1) ** 2
        return sorted(
            radius
            for radius in {*RADII, base}
            if base / SPREAD <= radius <= base * SPREAD
            and radius**2 <= diagonal2
            and radius >= (2 if self.far else 1)
        )


def make_calibrate_request(
    model: str,
    prompts: str,
    count: int,
    *,
    radius: int | None = None,
    far: bool | None = None,
    budget: float = 1.0,
    intervals: int = 4,
    points: int = 1,
    **settings: Any,
) -> CalibrateRequest:
    """A request in which whatever is None takes the model's default.

    Args:
        model: "demo", "demo-sd3", a folder in diffusers format, or a hub repository (owner/name).
        prompts: "demo" for captions of the demo's training, or a file (see `read_prompts`).
        count: prompts whose trajectories are measured; half as many more check the result.
        settings: height, width, steps, guidance, seed, dtype, device, as in `GenerateRequest`.

    Raises:
        RequestError: see `CalibrateRequest`, or the prompts.
    """
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_COUNT:
        raise RequestError(f"--count must be from 1 to {MAX_COUNT}, got {count!r}.")
    check = -(-count // 2)
    take = count + check
    texts = training_captions(take) if prompts == "demo" else read_prompts(prompts, limit=take)
    if len(texts) < take:
        raise RequestError(
            f"--count is {count}, and {check} more prompts check the result, but {prompts} has "
            f"{len(texts)}; ask for fewer."
        )
    generation = make_request("calibration", model, radius=radius, weights="none", **settings)
    return CalibrateRequest(
        generation,
        takes_far(far, generation.radius, 1),
        tuple(texts),
        check,
        budget,
        intervals,
        points,
    )


def training_captions(count: int, seed: int = 0) -> list[str]:
    """Captions of combinations that the demo was trained on, never the held-out ones."""
    import numpy as np

    from ..demo.captions import caption, sample_scene

    rng = np.random.default_rng(seed)
    return [caption(sample_scene(rng), rng) for _ in range(count)]
