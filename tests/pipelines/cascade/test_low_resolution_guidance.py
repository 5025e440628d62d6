"""Low frequencies of the previous image steer a stage, and nothing else."""

import pytest
import torch

from clear_dit.pipelines.cascade.low_resolution_guidance import LowResolutionGuidance


def noise(seed, size=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, size, size, generator=generator)


def coarse(latents, cells=4):
    return torch.nn.functional.adaptive_avg_pool2d(latents, cells)


def checkerboard(size=32):
    y, x = torch.arange(size)[:, None], torch.arange(size)
    return ((-1.0) ** (y + x)).expand(1, 2, size, size)


def test_a_prediction_that_is_the_reference_is_left_alone():
    reference, start = noise(0), noise(1)
    guidance = LowResolutionGuidance(reference, start, 2.0, 1.0)
    before = start
    for sigma, following in ((0.9, 0.5), (0.5, 0.2), (0.2, 0.0)):
        ratio = following / sigma
        after = ratio * before + (1 - ratio) * reference
        steered = guidance.steer(after, sigma, following)
        torch.testing.assert_close(steered, after, atol=1e-6, rtol=1e-5)
        before = steered


def test_a_constant_is_pulled_by_the_share_and_detail_is_kept():
    reference, start = torch.full((1, 2, 32, 32), 3.0), torch.zeros(1, 2, 32, 32)
    guidance = LowResolutionGuidance(reference, start, 2.0, 0.5)
    after = checkerboard()
    steered = guidance.steer(after, 0.8, 0.0)
    torch.testing.assert_close(steered.mean(), torch.tensor(0.5 * 0.8 * 3.0))
    torch.testing.assert_close(steered - steered.mean(), after, atol=0.01, rtol=0)


def test_full_weight_at_full_noise_gives_the_low_frequencies_of_the_reference():
    reference = torch.nn.functional.interpolate(noise(2, 4), (32, 32), mode="bicubic")
    guidance = LowResolutionGuidance(reference, noise(1), 2.0, 1.0)
    steered = guidance.steer(noise(3), 1.0, 0.0)
    before = (coarse(noise(3)) - coarse(reference)).abs().mean()
    assert (coarse(steered) - coarse(reference)).abs().mean() < 0.25 * before


def test_steering_fades_with_the_noise():
    def moved(sigma):
        guidance = LowResolutionGuidance(noise(0), noise(1), 2.0, 0.5)
        return (guidance.steer(noise(2), sigma, 0.0) - noise(2)).norm().item()

    assert moved(0.2) == pytest.approx(moved(0.8) / 4, rel=1e-4)


def test_dtype_and_odd_sizes():
    reference = torch.randn(2, 4, 7, 13)
    guidance = LowResolutionGuidance(reference, reference, 1.7, 0.5)
    steered = guidance.steer(reference.bfloat16(), 0.5, 0.25)
    assert steered.dtype == torch.bfloat16
    assert steered.shape == reference.shape
