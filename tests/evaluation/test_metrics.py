"""Values against their definitions, computed here by other means."""

import numpy as np
import pytest
import torch

from clear_dit.demo.probe import asked_labels, held_out_captions, held_out_scenes
from clear_dit.evaluation.metrics import (
    METRICS,
    attribute_accuracy,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_cosine,
    ms_ssim,
    psnr,
    ssim,
)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(3, 3, 12, 12, generator=generator)
    one = torch.nn.functional.interpolate(smooth, (176, 176), mode="bilinear")
    other = (one + 0.1 * torch.randn(one.shape, generator=generator)).clamp(0, 1)
    return one, other


def features(count=40, channels=6, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    return torch.randn(count, channels, generator=generator) @ mixing + shift


def test_psnr_is_the_formula(images):
    one, other = (batch.double().numpy() for batch in images)
    expected = [-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(one, other, strict=True)]
    assert psnr(*images).numpy() == pytest.approx(expected, rel=1e-5)


def test_identical_images(images):
    one, _ = images
    assert psnr(one, one).isinf().all()
    assert torch.allclose(ssim(one, one), torch.ones(3))
    assert torch.allclose(ms_ssim(one, one), torch.ones(3))


def test_ssim_is_the_formula(images):
    """Wang et al. 2004: 11 x 11 Gaussian windows of sigma 1.5; borders reflected."""
    axis = np.arange(11) - 5
    line = np.exp(-(axis**2) / (2 * 1.5**2))
    window = torch.tensor(np.outer(line, line) / line.sum() ** 2)[None, None]
    a, b = (batch.double().reshape(-1, 1, 176, 176) for batch in images)

    def blur(x):
        padded = torch.nn.functional.pad(x, (5, 5, 5, 5), mode="reflect")
        return torch.nn.functional.conv2d(padded, window)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    value = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
    value /= (mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2)
    expected = value.reshape(3, -1).mean(1)
    assert ssim(*images).numpy() == pytest.approx(expected.numpy(), rel=1e-4)


def test_frechet_distance_is_the_formula():
    a, b = features(shift=0.3), features(seed=1)
    mean, other_mean = (x.double().mean(0) for x in (a, b))
    covariance, other = (torch.cov(x.double().T) for x in (a, b))
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other @ root).sqrt().sum()
    expected = (mean - other_mean).square().sum() + (covariance + other).trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)


def test_kernel_distance_is_the_formula():
    a, b = features(shift=0.3).double(), features(seed=1).double()

    def kernel(x, y):
        return (x @ y.T / 6 + 1) ** 3

    n = len(a)
    within = sum((kernel(x, x).sum() - kernel(x, x).trace()) / (n * (n - 1)) for x in (a, b))
    expected = within - 2 * kernel(a, b).mean()
    assert kernel_distance(a, b) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_distances_know_sets_not_orders(distance):
    a, b = features(shift=0.3), features(seed=1)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(5))
    assert distance(a[order], b) == pytest.approx(distance(a, b), rel=1e-9)
    assert distance(a, b[order]) == pytest.approx(distance(a, b), rel=1e-9)
    assert abs(frechet_distance(a, a[order])) < 1e-5
    assert kernel_distance(a, a[order]) <= 0 < kernel_distance(a, features(seed=2, shift=9.0))


def test_frechet_distance_with_fewer_images_than_channels():
    a = features(5, 128)
    spread = float(torch.cov(a.double().T).trace())
    assert abs(frechet_distance(a, a)) < 1e-6 * spread
    assert frechet_distance(a, a + 9) == pytest.approx(128 * 81, rel=1e-4)


def test_random_numbers_elsewhere_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, second = inception_score(features()), inception_score(features())
    assert first == second
    assert torch.equal(torch.rand(2), expected)


def test_inception_score_of_sure_and_even_classes():
    even = torch.eye(4).repeat(25, 1) * 100
    assert inception_score(even[:4].repeat(1, 1)) == pytest.approx(1.0)
    assert 3 < inception_score(even.repeat(10, 1)) <= 4.001


def test_mean_cosine():
    a = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert mean_cosine(a, torch.tensor([[2.0, 0.0], [4.0, -3.0]])) == pytest.approx(50)


def test_attributes_are_those_the_prompts_name():
    scenes, captions = held_out_scenes(12), held_out_captions(12)
    labels = np.array([scene.labels for scene in scenes])
    assert (asked_labels(captions) == labels).all()
    assert attribute_accuracy(torch.tensor(labels), captions) == 100
    assert held_out_captions(5) == captions[:5]
    partial = ["A pink tower at night", "nothing of that kind"]
    assert (asked_labels(partial) >= 0).sum() == 3
    assert attribute_accuracy(torch.zeros(2, 7, dtype=torch.long), partial) == 0


def test_every_metric_says_which_way_is_better():
    assert {metric.better for metric in METRICS.values()} == {"higher", "lower"}
    with_features = {name for name, metric in METRICS.items() if metric.from_features}
    assert {"psnr", "ssim", "ms_ssim", "lpips", "output_mse"} == METRICS.keys() - with_features
