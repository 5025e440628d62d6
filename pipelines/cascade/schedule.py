"""Noise levels that suit the size of an image.

The more tokens an image has, the more noise it takes to hide its content; samplers follow by
shifting the noise levels (sigmas) up: sigma' = shift sigma / (1 + (shift - 1) sigma)
(arXiv 2403.03206, section 5.3.2). FLUX's dynamic shifting takes log(shift) to be linear in the
tokens. That holds up to about 2 megapixels, where it was fitted; beyond, it is extrapolation: 25
at 2048 px, 1e5 at 4096 px and 3e19 at 8192 px, where every step but the last starts from noise.
Here a stage of high resolution has a static shift, and an extrapolated one is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from clear_dit.compat import names_from
from clear_dit.families.recipe import linear_shift

FlowMatchEulerDiscreteScheduler: Any
(FlowMatchEulerDiscreteScheduler,) = names_from("diffusers", "FlowMatchEulerDiscreteScheduler")

# The most that dynamic shifting may come to: FLUX.1-dev reaches 6.3 at its largest size, 2
# megapixels, and 10 at 1670 x 1670 pixels. With 28 steps the last one then starts at sigma 0.27.
# FLUX.2 comes to 10.1 at its native size, in 4 steps.
LARGEST_DYNAMIC_SHIFT = 10.5

# Image tokens to log(shift), as a pipeline sets it for dynamic shifting.
Mu = Callable[[int], float]

# Everything that moves sigmas in FlowMatchEulerDiscreteScheduler, off.
_AS_GIVEN = {
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


def sigmas_for(
    scheduler: Any,
    steps: int,
    height: int,
    width: int,
    *,
    strength: float = 1.0,
    taken: int | None = None,
    token_pixels: int = 16,
    mu: Mu | None = None,
) -> list[float]:
    """The noise levels at which the steps of an image start; pass them inside `given_sigmas`.

    Args:
        scheduler: of the pipeline, a `FlowMatchEulerDiscreteScheduler`; it is not changed.
        steps: of a whole schedule, from sigma 1; a part of it has its share, rounded up.
        height, width: of the image, in pixels.
        strength: the sigma to start at, over 0 and at most 1. 1 starts from noise alone; an
            image-to-image stage starts from (1 - strength) image + strength noise.
        taken: number of steps to take from there; None for the share of the schedule.
        token_pixels: side of a token.
        mu: of the pipeline; FLUX.1's where None.

    Returns:
        Falling sigmas, the first is `strength` (with 1: what the scheduler starts at). The zero
        that ends a schedule is not among them; schedulers append it.

    Raises:
        ValueError: another scheduler, steps below 1, strength out of its range, or a dynamic shift
            that `check_dynamic_shift` refuses.
    """
    _check_scheduler(scheduler)
    if min(steps, taken or steps) < 1:
        raise ValueError(f"sigmas_for: steps must be at least 1, got {min(steps, taken or steps)}.")
    if not 0 < strength <= 1:
        raise ValueError(f"sigmas_for: strength must be over 0 and at most 1, got {strength}.")
    check_dynamic_shift(scheduler, height, width, token_pixels, mu)
    own = copy.deepcopy(scheduler)
    tokens = (height // token_pixels) * (width // token_pixels)
    # What diffusers' pipelines ask for, from first to last.
    log_shift = linear_shift(scheduler.config, tokens) if mu is None else mu(tokens)
    own.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=log_shift)
    levels = own.sigmas.double().numpy()  # [steps + 1], the last is 0
    if strength >= levels[0] and taken in (None, steps):
        return levels[:-1].tolist()
    # Where the schedule crosses the strength, counted in steps; the rest is taken as evenly.
    crossing = np.interp(-strength, -levels, np.arange(steps + 1))
    taken = taken or max(1, math.ceil(steps - crossing - 1e-4))
    places = np.linspace(crossing, steps, taken + 1)[:-1]
    rest: list[float] = np.interp(places, np.arange(steps + 1), levels).tolist()
    return [min(strength, float(levels[0])), *rest[1:]]


def place_of(sigma: float, levels: list[float]) -> float:
    """Where a schedule of these falling noise levels crosses a sigma: 0 at its first, 1 at 0."""
    falling = -np.asarray([*levels, 0.0])
    return float(np.interp(-sigma, falling, np.linspace(0, 1, len(falling))))


def static_scheduler(scheduler: Any, shift: float) -> Any:
    """A copy that shifts sigmas by a constant, whatever the size of the image.

    Raises:
        ValueError: the scheduler is no `FlowMatchEulerDiscreteScheduler`.
    """
    _check_scheduler(scheduler)
    return type(scheduler).from_config(
        scheduler.config, shift=shift, use_dynamic_shifting=False, shift_terminal=None
    )


@contextmanager
def given_sigmas(pipe: Any) -> Iterator[None]:
    """Within it, `sigmas=` of a pipeline's call are the noise levels themselves.

    Otherwise the scheduler shifts them (again). Afterwards the pipeline has its scheduler back.

    Raises:
        ValueError: the scheduler is no `FlowMatchEulerDiscreteScheduler`.
    """
    own = pipe.scheduler
    _check_scheduler(own)
    pipe.scheduler = type(own).from_config(own.config, **_AS_GIVEN)
    try:
        yield
    finally:
        pipe.scheduler = own


def check_dynamic_shift(
    scheduler: Any, height: int, width: int, token_pixels: int = 16, mu: Mu | None = None
) -> None:
    """Refuse an image size that dynamic shifting was never meant for.

    Args:
        scheduler: any; one without dynamic shifting passes.
        height, width: of the image, in pixels.
        token_pixels: side of a token.
        mu: of the pipeline; FLUX.1's where None.

    Raises:
        ValueError: the shift would be over `LARGEST_DYNAMIC_SHIFT`; how to get another one.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return
    tokens = (height // token_pixels) * (width // token_pixels)
    log_shift = linear_shift(scheduler.config, tokens) if mu is None else mu(tokens)
    if config.get("time_shift_type", "exponential") == "linear":
        log_shift = math.log(max(log_shift, 1e-9))
    if log_shift > math.log(LARGEST_DYNAMIC_SHIFT):
        raise ValueError(
            f"CLEAR: at {width} x {height} pixels the scheduler's dynamic shifting is extrapolated "
            f"to a shift of {math.exp(min(log_shift, 700.0)):.2g}, which leaves noise in the "
            f"image (at most {LARGEST_DYNAMIC_SHIFT:g} is taken). Set a static one: "
            "pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, "
            "use_dynamic_shifting=False, shift=3.0)."
        )


def _check_scheduler(scheduler: Any) -> None:
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            "CLEAR: noise levels of a stage can be set for FlowMatchEulerDiscreteScheduler only, "
            f"got {type(scheduler).__name__}."
        )
