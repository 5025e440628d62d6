"""A stage's own scheduler: few steps go further, and stock pipelines need not be told or call back.

They ask it for the noise levels, and give it every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from clear_dit.compat import names_from

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler
else:
    (FlowMatchEulerDiscreteScheduler,) = names_from("diffusers", "FlowMatchEulerDiscreteScheduler")
# A type checker would take its types for ours.
_stock: Any = FlowMatchEulerDiscreteScheduler

# (number of the step from 0, its timestep, latents) to the latents that come instead.
AfterStep = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def takes_eulers_steps(scheduler: Any) -> bool:
    """Whether a scheduler's steps are plain ones, for which others may stand in."""
    plain = type(scheduler) is FlowMatchEulerDiscreteScheduler
    return plain and not scheduler.config.get("stochastic_sampling", False)


class Ended(BaseException):
    """Somebody ended the call, of a stock pipeline that does not look for that.

    No `Exception`, of which a modular pipeline's blocks say each that they failed.

    Attributes:
        latents: as they are.
    """

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__("ended")
        self.latents = latents


class StageScheduler(FlowMatchEulerDiscreteScheduler):
    """The levels it is made with, whatever it is asked for; and somebody is told of every step.

    Made by `of`.
    """

    levels: Sequence[float] | None = None
    after_step: AfterStep | None = None
    second_order: bool = False
    _velocity: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        scheduler: Any,
        levels: Sequence[float] | None,
        after_step: AfterStep | None,
        second_order: bool = False,
    ) -> StageScheduler:
        """One with another scheduler's configuration.

        Args:
            scheduler: a `FlowMatchEulerDiscreteScheduler`.
            levels: noise levels at which the steps start, which it takes as they are; None for
                those it is asked for.
            after_step: told of every step; None for nobody.
            second_order: whether a step after the first goes by the velocity before too (two-step
                Adams-Bashforth, with steps of any lengths), which costs nothing. Few of these make
                as much detail as many of Euler's.
        """
        made: StageScheduler = cls.from_config(scheduler.config)
        made.levels, made.after_step, made.second_order = levels, after_step, second_order
        return made

    @functools.wraps(_stock.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        if self.levels is not None:
            device = kwargs.get("device", args[1] if len(args) > 1 else None)
            args, kwargs = (), {"sigmas": list(self.levels), "device": device}
        self._velocity = None
        super().set_timesteps(*args, **kwargs)

    @functools.wraps(_stock.step)
    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if self.second_order:
            model_output = self._with_the_last(model_output, timestep)
        made = super().step(model_output, timestep, sample, *args, **kwargs)
        if self.after_step is None:
            return made
        as_tuple = isinstance(made, tuple)
        latents = made[0] if as_tuple else made.prev_sample
        latents = self.after_step(self.step_index - 1, timestep, latents)
        return (latents, *made[1:]) if as_tuple else type(made)(prev_sample=latents)

    def _with_the_last(self, velocity: torch.Tensor, timestep: Any) -> torch.Tensor:
        """The velocity of a step that is a second-order one, from this velocity and the last."""
        if self.step_index is None:
            self._init_step_index(timestep)
        last, self._velocity = self._velocity, velocity
        if last is None:
            return velocity
        before, now, after = self.sigmas[self.step_index - 1 : self.step_index + 2].tolist()
        share = (after - now) / (now - before) / 2
        return (velocity.float() + share * (velocity.float() - last.float())).to(velocity.dtype)
