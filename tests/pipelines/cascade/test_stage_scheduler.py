"""Second-order steps of a stage's scheduler."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from clear_dit.pipelines.cascade.stage_scheduler import StageScheduler, takes_eulers_steps

# Steps of unlike lengths.
LEVELS = ([0.9, 0.5, 0.3], [0.9, 0.75, 0.5, 0.42, 0.3, 0.12])


def end_of(levels, second_order):
    """Where dx / d sigma = x + sigma leads, from x = 1 at 0.9 to sigma 0."""
    stage = StageScheduler.of(FlowMatchEulerDiscreteScheduler(), levels, None, second_order)
    stage.set_timesteps(3)  # the levels are its own
    x = torch.ones(1, 4, dtype=torch.float64)
    for timestep, sigma in zip(stage.timesteps, stage.sigmas.tolist(), strict=False):
        x = stage.step(x + sigma, timestep, x, return_dict=False)[0].double()
    return x[0, 0].item()


def test_half_the_step_is_a_quarter_of_the_error():
    exact = (1 + 0.9 + 1) * math.exp(-0.9) - 1  # x + sigma + 1 is c e^sigma
    errors = {
        order: [abs(end_of(levels, order) - exact) for levels in LEVELS] for order in (False, True)
    }
    assert errors[False][0] / errors[False][1] == pytest.approx(2, rel=0.2)
    assert errors[True][0] / errors[True][1] > 3
    assert errors[True][1] < errors[False][1] / 5


def test_one_step_is_eulers():
    assert end_of([0.9], True) == pytest.approx(end_of([0.9], False), rel=1e-6)


def test_a_new_image_begins_without_the_last():
    stage = StageScheduler.of(FlowMatchEulerDiscreteScheduler(), LEVELS[0], None, True)
    ends = []
    for _ in range(2):
        stage.set_timesteps(3)
        x = torch.ones(1, 4)
        for timestep in stage.timesteps:
            x = stage.step(torch.sin(x), timestep, x).prev_sample
        ends.append(x)
    assert torch.equal(*ends)


def test_steps_of_others_stay_theirs():
    class Own(FlowMatchEulerDiscreteScheduler):
        pass

    assert takes_eulers_steps(FlowMatchEulerDiscreteScheduler())
    assert not takes_eulers_steps(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    assert not takes_eulers_steps(Own())
