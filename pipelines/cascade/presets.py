"""How images are enlarged: by how much at a time, from what noise level on, in how many steps.

- "repaint" doubles. It starts from noise enough to invent what an enlargement lacks, and takes its
  share of a whole schedule.
- "refine" starts from little noise and takes two steps at most, without guidance: the image before
  decides what is seen, and its finest detail alone is made anew (as MrFlow, arXiv 2607.01642, from
  sigma 0.12 to 0.2; guidance has little to say at low noise levels, arXiv 2404.07724).
- "auto" repaints up to `REPAINTED_UP_TO` times the native size. Beyond, where a step is dear, it
  takes three steps at most, without guidance, and starts from a little more noise, which makes up
  for the detail that guidance adds.

Steps that are fewer than the share of the schedule are of second order (`StageScheduler`). A model
of few steps takes its share, as it was trained to.

Why these: the demo, 1024 to 2048 px, radius 8 with its weights, float32, one prompt. PSNR of the
result, scaled down, to the image before, and gradient energy against its Lanczos enlargement:

    steps                              sigma 0.2        0.3         0.4         0.55
    6, guidance 2 (12 forwards)                                                 30.8 dB 2.04
    6                                                                           30.6 dB 1.92
    3                                               36.2 dB 1.67  33.6 dB 1.72  30.8 dB 1.80
    3 of second order                                             33.4 dB 1.79  30.5 dB 1.99
    2                               38.6 dB 1.58                                31.0 dB 1.71
    2 of second order                                                           30.6 dB 1.91
    1                               38.6 dB 1.55

And from there to 2896 px, in three steps of second order:

    sigma 0.55    29.6 dB 2.84, with guidance 29.7 dB 3.06
    sigma 0.62    28.2 dB 3.21
    sigma 0.7     26.6 dB 3.87 (four steps)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from clear_dit.kernels.numbers import as_number, integer, number

WHO = "CLEARPipeline"
AUTO = "auto"
MOST_STEPS = 1000


@dataclass(frozen=True)
class Start:
    """Of a stage: see `Stage`."""

    strength: float | None
    steps: int | None = None
    most_steps: int | None = None
    guided: bool = True


NOISE = Start(None)
REPAINT, REFINE = Start(0.55), Start(0.2, most_steps=2, guided=False)
# What "auto" does instead of repainting, where images are large.
FURTHER = Start(0.62, most_steps=3, guided=False)
PRESETS = (AUTO, "repaint", "refine")
# Linear, of the native size.
REPAINTED_UP_TO = 2.0
# What a stage enlarges by at most, linear: up to there, and beyond.
REPAINT_BY, REFINE_BY = 2.0, 3.0
# A side rounded to whole tokens may be a little longer.
SLACK = 1.05


def enlargements(scale: float, start: float, preset: str = AUTO, slack: float = 1.0) -> list[float]:
    """What the stages enlarge by, linear: the fewest that come to a scale, evenly where they can.

    Args:
        scale: over 1.
        start: the size of the first image, linear, of the native one.
        preset: one of `PRESETS`.
        slack: how much larger, linear, the first image may become so that stages are fewer.
    """
    check_preset(preset)
    most = REFINE_BY if preset == "refine" else REPAINT_BY
    repainted = 0
    if preset == AUTO and start * scale > REPAINTED_UP_TO * SLACK:
        most, repainted = REFINE_BY, max(0, math.floor(math.log2(REPAINTED_UP_TO * SLACK / start)))
    rest = scale / REPAINT_BY**repainted
    further = max(math.ceil(math.log(rest / slack, most) - 1e-9), 0 if repainted else 1)
    even = scale ** (1 / (repainted + further))
    if even <= REPAINT_BY:
        return [even] * (repainted + further)
    doubled = [REPAINT_BY] * repainted
    return doubled + [min(most, rest ** (1 / further))] * further if further else doubled


def starts_of(
    sizes: Sequence[float],
    preset: str = AUTO,
    strength: float | Sequence[float] | None = None,
    stage_steps: int | Sequence[int] | None = None,
) -> list[Start]:
    """Where each of the stages that enlarge starts.

    Args:
        sizes: of the stages' images, linear, of the native one.
        preset: one of `PRESETS`.
        strength: instead of the preset's, of all these stages or one for each. Steps are then the
            share of a schedule, with guidance.
        stage_steps: instead of the preset's or the share, for all these stages or one for each.
            What is not denoised (strength 0) has none.

    Raises:
        ValueError: an unknown preset, a value out of its range, or not one for each stage.
    """
    check_preset(preset)
    starts = [_preset(preset, size) for size in sizes]
    strengths = _for_each("strength", strength, len(starts), lambda who, x: number(who, x, 0, 1))
    steps = _for_each(
        "stage_steps", stage_steps, len(starts), lambda who, x: integer(who, x, 0, MOST_STEPS)
    )
    if strengths is not None:
        starts = [Start(value) for value in strengths]
    if steps is None:
        return starts
    if as_number(stage_steps) is not None:  # of those that are denoised
        steps = [value if start.strength else 0 for start, value in zip(starts, steps, strict=True)]
    for place, (start, value) in enumerate(zip(starts, steps, strict=True), 1):
        if (value == 0) != (start.strength == 0):
            raise ValueError(
                f"{WHO}: stage_steps: enlargement {place} of {len(starts)} cannot have {value} "
                f"steps from strength {start.strength:g}; a strength of 0 has 0 steps, any other "
                "at least 1."
            )
    return [
        replace(start, steps=value, most_steps=None)
        for start, value in zip(starts, steps, strict=True)
    ]


def check_preset(preset: str) -> None:
    """Refuse what is none of `PRESETS`, with a ValueError."""
    if preset not in PRESETS:
        raise ValueError(f"{WHO}: preset must be one of {', '.join(PRESETS)}; got {preset!r}.")


def _preset(preset: str, size: float) -> Start:
    if preset == AUTO:
        return REPAINT if size <= REPAINTED_UP_TO * SLACK else FURTHER
    return REPAINT if preset == "repaint" else REFINE


def _for_each(name: str, given: Any, stages: int, check: Any) -> list[Any] | None:
    """A value for each stage, or None where none is given."""
    if given is None:
        return None
    who = f"{WHO}: {name}"
    if getattr(given, "ndim", isinstance(given, (tuple, list))) != 1:
        return [check(who, given)] * stages
    values = list(given)
    if len(values) != stages:
        raise ValueError(
            f"{who} has {len(values)} values, but {stages} stages enlarge an image; give one "
            "number, or one for each."
        )
    return [check(who, value) for value in values]
