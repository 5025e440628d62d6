"""A scheduler of a call's own, for stock pipelines that cannot be told noise levels or called back.

It is what they all have: they ask it for the levels, and give it every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from clear_dit.compat import names_from

(FlowMatchEulerDiscreteScheduler,) = names_from("diffusers", "FlowMatchEulerDiscreteScheduler")

# (number of the step from 0, its timestep, latents) to the latents that come instead.
AfterStep = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


class Ended(BaseException):
    """Somebody ended the call, of a stock pipeline that does not look for that.

    No `Exception`, of which a modular pipeline's blocks say each that they failed.

    Attributes:
        latents: as they are.
    """

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__("ended")
        self.latents = latents


class StageScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc, valid-type]
    """The levels it is made with, whatever it is asked for; and somebody is told of every step.

    Made by `of`.
    """

    levels: Sequence[float] | None = None
    after_step: AfterStep | None = None

    @classmethod
    def of(
        cls, scheduler: Any, levels: Sequence[float] | None, after_step: AfterStep | None
    ) -> StageScheduler:
        """One with another scheduler's configuration.

        Args:
            scheduler: a `FlowMatchEulerDiscreteScheduler`.
            levels: noise levels at which the steps start, which it takes as they are; None for
                those it is asked for.
            after_step: told of every step; None for nobody.
        """
        made: StageScheduler = cls.from_config(scheduler.config)
        made.levels, made.after_step = levels, after_step
        return made

    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        if self.levels is not None:
            device = kwargs.get("device", args[1] if len(args) > 1 else None)
            args, kwargs = (), {"sigmas": list(self.levels), "device": device}
        super().set_timesteps(*args, **kwargs)

    @functools.wraps(FlowMatchEulerDiscreteScheduler.step)
    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        made = super().step(model_output, timestep, sample, *args, **kwargs)
        if self.after_step is None:
            return made
        as_tuple = isinstance(made, tuple)
        latents = made[0] if as_tuple else made.prev_sample
        latents = self.after_step(self.step_index - 1, timestep, latents)
        return (latents, *made[1:]) if as_tuple else type(made)(prev_sample=latents)
