"""Noise levels: those of stock diffusers where they are sound, refused where they are not."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from clear_dit.pipelines.cascade.schedule import (
    check_dynamic_shift,
    given_sigmas,
    sigmas_for,
    static_scheduler,
)

# The scheduler_config.json of three pipelines.
FLUX_DEV = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
FLUX_SCHNELL = FLUX_DEV | {"shift": 1.0, "use_dynamic_shifting": False}
DEMO = {"shift": 3.0, "use_dynamic_shifting": False}
LINEAR = FLUX_DEV | {"time_shift_type": "linear"}
KARRAS = DEMO | {"use_karras_sigmas": True}
CONFIGS = {
    "dev": FLUX_DEV,
    "schnell": FLUX_SCHNELL,
    "demo": DEMO,
    "linear": LINEAR,
    "karras": KARRAS,
}


def scheduler_of(config):
    return FlowMatchEulerDiscreteScheduler(**config)


def shifted(sigmas, shift):
    sigmas = np.asarray(sigmas)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stock(config, steps, height, width):
    """What FluxPipeline sets."""
    scheduler = scheduler_of(config)
    mu = calculate_shift((height // 16) * (width // 16))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return scheduler.sigmas[:-1].tolist()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(1024, 1024), (512, 1536), (1536, 512), (256, 272)])
def test_own_schedule_is_the_stock_one(name, size):
    for steps in (1, 4, 28):
        sigmas = sigmas_for(scheduler_of(CONFIGS[name]), steps, *size)
        assert sigmas == stock(CONFIGS[name], steps, *size)
        assert len(sigmas) == steps


def test_the_shift_of_flux_dev_follows_the_size():
    """At 1024 px exp(1.15) = 3.16; at 256 px exp(0.5); both sides count."""
    scheduler = scheduler_of(FLUX_DEV)
    for size, mu in (((1024, 1024), 1.15), ((256, 256), 0.5), ((2048, 512), 1.15)):
        expected = shifted(np.linspace(1, 1 / 28, 28), np.exp(mu))
        np.testing.assert_allclose(sigmas_for(scheduler, 28, *size), expected, rtol=1e-5)
    smaller_tokens = sigmas_for(scheduler, 28, 256, 256, token_pixels=4)
    assert smaller_tokens == sigmas_for(scheduler, 28, 1024, 1024)
    changed = scheduler_of(DEMO)
    changed.set_shift(5.0)
    expected = shifted(np.linspace(1, 1 / 7, 7), 5.0)
    np.testing.assert_allclose(sigmas_for(changed, 7, 64, 64), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["dev", "schnell", "demo", "linear"])
@pytest.mark.parametrize("size", [(2048, 2048), (8192, 8192), (64, 128)])
def test_static_shift_at_any_size(name, size):
    scheduler = scheduler_of(CONFIGS[name])
    before = dict(scheduler.config), scheduler.sigmas.clone()
    sigmas = sigmas_for(static_scheduler(scheduler, 4.0), 20, *size)
    np.testing.assert_allclose(sigmas, shifted(np.linspace(1, 0.05, 20), 4.0), rtol=1e-5)
    assert sigmas[-1] < 0.2
    assert dict(scheduler.config) == before[0]
    assert torch.equal(scheduler.sigmas, before[1])


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("strength", [0.05, 0.3, 0.55, 0.9])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_strength_is_the_first_level_and_the_rest_keeps_its_pace(shift, strength, steps):
    sigmas = sigmas_for(
        static_scheduler(scheduler_of(DEMO), shift), steps, 64, 64, strength=strength
    )
    assert sigmas[0] == strength
    assert sigmas == sorted(set(sigmas), reverse=True)
    assert sigmas[-1] > 0
    part = strength / (shift - (shift - 1) * strength)  # of the way, undoing the shift
    assert len(sigmas) == math.ceil(steps * part - 1e-4)
    if steps == 20:
        even = shifted(np.linspace(part, part / len(sigmas), len(sigmas)), shift)
        np.testing.assert_allclose(sigmas, even, atol=0.01)


def test_strength_at_a_level_cuts_there():
    whole = sigmas_for(scheduler_of(FLUX_DEV), 10, 768, 1024)
    for index in (1, 4, 9):
        cut = sigmas_for(scheduler_of(FLUX_DEV), 10, 768, 1024, strength=whole[index])
        np.testing.assert_allclose(cut, whole[index:], rtol=1e-9)


def timesteps_of(pipe, sigmas=None, **options):
    """The noise levels a pipeline's call really takes."""
    seen = []
    pipe(
        "a house",
        height=8,
        width=12,
        sigmas=sigmas,
        max_sequence_length=4,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(t.item() / 1000) or kwargs,
        **options,
    )
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_given_sigmas_are_taken_as_they_are(tiny_pipeline, name):
    pipe = tiny_pipeline(FluxPipeline)
    pipe.scheduler = own = scheduler_of(CONFIGS[name])
    sigmas = sigmas_for(own, 5, 1024, 1024, strength=0.6)
    with given_sigmas(pipe):
        np.testing.assert_allclose(timesteps_of(pipe, sigmas), sigmas, rtol=1e-6)
    assert pipe.scheduler is own
    if name != "schnell":  # which shifts by 1
        assert not np.allclose(timesteps_of(pipe, sigmas), sigmas, rtol=1e-2)
    with pytest.raises(KeyboardInterrupt), given_sigmas(pipe):
        raise KeyboardInterrupt
    assert pipe.scheduler is own


def test_static_scheduler_in_a_pipeline(tiny_pipeline):
    pipe = tiny_pipeline(FluxPipeline)
    pipe.scheduler = static_scheduler(scheduler_of(FLUX_DEV), 2.0)
    expected = shifted([1, 0.75, 0.5, 0.25], 2.0)
    np.testing.assert_allclose(timesteps_of(pipe, num_inference_steps=4), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "last", "shift"), [(2048, 0.48, "25"), (4096, 0.9997, "1e+05"), (8192, 1.0, "2.9e+19")]
)
def test_extrapolated_dynamic_shift_is_refused(size, last, shift):
    """What stock FLUX.1-dev would do: end 28 steps with this much noise."""
    assert stock(FLUX_DEV, 28, size, size)[-1] == pytest.approx(last, abs=0.005)
    refused = rf"CLEAR: at {size} x {size} pixels .* to a shift of {shift.replace('+', '.')}, "
    scheduler = scheduler_of(FLUX_DEV)
    with pytest.raises(ValueError, match=refused):
        check_dynamic_shift(scheduler, size, size)
    with pytest.raises(ValueError, match=refused):
        sigmas_for(scheduler, 28, size, size)
    remedy = scheduler.from_config(scheduler.config, use_dynamic_shifting=False, shift=3.0)
    check_dynamic_shift(remedy, size, size)
    check_dynamic_shift(static_scheduler(scheduler, 3.0), size, size)


def test_what_dynamic_shifting_was_made_for_passes():
    for height, width in ((1024, 1024), (1440, 1440), (1152, 1792), (640, 1536)):
        check_dynamic_shift(scheduler_of(FLUX_DEV), height, width)
    for name in ("schnell", "demo", "karras"):
        check_dynamic_shift(scheduler_of(CONFIGS[name]), 65536, 65536)
    check_dynamic_shift(scheduler_of(LINEAR), 3072, 3072)  # mu 6.7 is the shift there, not its log
    check_dynamic_shift(FlowMatchHeunDiscreteScheduler(), 8192, 8192)
    with pytest.raises(ValueError, match=r"to a shift of 1e.304,"):
        check_dynamic_shift(scheduler_of(FLUX_DEV), 65536, 65536)
    with pytest.raises(ValueError, match="at 512 x 512 pixels"):
        check_dynamic_shift(scheduler_of(FLUX_DEV), 512, 512, token_pixels=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"strength": 0.0}, "strength must be over 0 and at most 1, got 0.0"),
        ({"strength": 1.01}, "strength must be over 0 and at most 1, got 1.01"),
        ({"strength": float("nan")}, "strength must be .* got nan"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sigmas_for(scheduler_of(DEMO), **({"steps": 4, "height": 64, "width": 64} | options))


def test_other_schedulers_are_refused(tiny_pipeline):
    other = FlowMatchHeunDiscreteScheduler()
    pipe = tiny_pipeline(FluxPipeline)
    pipe.scheduler = other
    with pytest.raises(ValueError, match=r"only, got FlowMatchHeunDiscreteScheduler"):
        sigmas_for(other, 4, 64, 64)
    with pytest.raises(ValueError, match="FlowMatchHeun"), given_sigmas(pipe):
        pass
    with pytest.raises(ValueError, match="FlowMatchHeun"):
        static_scheduler(other, 3.0)
    assert pipe.scheduler is other
