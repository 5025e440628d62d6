"""The metrics by name, each computed by torchmetrics from images or from a network's features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

# What a network says of the images of one variant, by name: (images, ...).
Features = Mapping[str, torch.Tensor]

# Scales 5, window 11: the smallest image is one pixel more (Wang et al. 2003, torchmetrics).
MS_SSIM_ABOVE = 160
KID_SUBSET, KID_SUBSETS = 1000, 100
IS_SPLITS = 10


@dataclass(frozen=True)
class Metric:
    """A column of the table.

    Attributes:
        title: its head.
        better: "higher" or "lower".
        digits: after the point.
        network: that it needs, see `networks.py`; None for arithmetic on pixels or predictions.
        least: images it needs.
        of_teacher: whether the teacher has a value too, as it compares with no other variant.
        from_features: (teacher's, variant's, prompts) -> value, where it is made of features.
    """

    title: str
    better: str
    digits: int
    network: str | None = None
    least: int = 1
    of_teacher: bool = False
    from_features: Callable[[Features, Features, Sequence[str]], float] | None = None


def psnr(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """10 log10(1 / MSE) of each image, dB; infinite where they are identical."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    value = peak_signal_noise_ratio(
        student, teacher, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    assert isinstance(value, torch.Tensor)
    return value


def ssim(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (Wang et al. 2004; Gaussian window, sigma 1.5)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(student, teacher, data_range=1.0, reduction="none")
    assert isinstance(value, torch.Tensor)
    return value


def ms_ssim(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Multi-scale structural similarity of each image (Wang et al. 2003; five scales)."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    return multiscale_structural_similarity_index_measure(
        student, teacher, data_range=1.0, reduction="none"
    )


# On float images (batch, 3, height, width) in [0, 1]: a value for each. LPIPS joins them once its
# network is loaded.
PIXEL_METRICS = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}


class _Features(nn.Module):
    """Stands where torchmetrics expects a network, and is given features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@contextmanager
def _seeded_and_quiet() -> Iterator[None]:
    """Fixed subsets; without torchmetrics' notices that features are kept in memory."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore", UserWarning)
        yield


def frechet_distance(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """FID (Heusel et al. 2017) of features (images, channels), in float64.

    Depends on the number of images: compare only values of equally many.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    with _seeded_and_quiet():
        metric = FrechetInceptionDistance(feature=_Features(teacher.shape[1]))
        metric.update(teacher.double(), real=True)
        metric.update(student.double(), real=False)
        return float(metric.compute())


def kernel_distance(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """KID (Binkowski et al. 2018), the unbiased estimate; near or below 0 for equal distributions.

    Of all images up to KID_SUBSET, beyond that the mean over KID_SUBSETS random subsets.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET, len(teacher))
    subsets = 1 if len(teacher) <= KID_SUBSET else KID_SUBSETS
    with _seeded_and_quiet():
        metric = KernelInceptionDistance(
            feature=_Features(teacher.shape[1]), subsets=subsets, subset_size=size
        )
        metric.update(teacher.double(), real=True)
        metric.update(student.double(), real=False)
        return float(metric.compute()[0])


def inception_score(logits: torch.Tensor) -> float:
    """IS (Salimans et al. 2016) of logits (images, classes): mean over IS_SPLITS."""
    from torchmetrics.image.inception import InceptionScore

    with _seeded_and_quiet():
        metric = InceptionScore(
            feature=_Features(logits.shape[1]), splits=min(IS_SPLITS, len(logits))
        )
        metric.update(logits.double())
        return float(metric.compute()[0])


def mean_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """100 times the mean cosine of matching rows."""
    return 100 * float(torch.cosine_similarity(a.double(), b.double()).mean())


def attribute_accuracy(seen: torch.Tensor, prompts: Sequence[str]) -> float:
    """Percent of the attributes named in the prompts that the images show."""
    from ..demo.probe import asked_labels

    asked = asked_labels(prompts)
    return 100 * float((seen.numpy() == asked)[asked >= 0].mean())


def names_attributes(prompts: Sequence[str]) -> bool:
    """Whether any prompt names an attribute of the demo's world."""
    from ..demo.probe import asked_labels

    return bool(np.any(asked_labels(prompts) >= 0))


def _between(measure: Callable[[Any, Any], float], key: str) -> Any:
    return lambda teacher, student, prompts: measure(teacher[key], student[key])


METRICS = {
    "fid": Metric(
        "FID", "lower", 2, "inception", 2, from_features=_between(frechet_distance, "features")
    ),
    "kid": Metric(
        "KID", "lower", 5, "inception", 2, from_features=_between(kernel_distance, "features")
    ),
    "lpips": Metric("LPIPS", "lower", 3, "lpips"),
    "psnr": Metric("PSNR", "higher", 2),
    "ssim": Metric("SSIM", "higher", 3),
    "ms_ssim": Metric("MS-SSIM", "higher", 3),
    "clip_i": Metric(
        "CLIP-I", "higher", 2, "clip", from_features=_between(mean_cosine, "features")
    ),
    "dino": Metric("DINO", "higher", 2, "dino", from_features=_between(mean_cosine, "features")),
    "fid_demo": Metric(
        "fid_demo", "lower", 3, "probe", 2, from_features=_between(frechet_distance, "features")
    ),
    "kid_demo": Metric(
        "kid_demo", "lower", 5, "probe", 2, from_features=_between(kernel_distance, "features")
    ),
    "output_mse": Metric("output MSE", "lower", 5),
    "clip_t": Metric(
        "CLIP-T",
        "higher",
        2,
        "clip",
        of_teacher=True,
        from_features=lambda _, student, prompts: mean_cosine(student["features"], student["text"]),
    ),
    "is": Metric(
        "IS",
        "higher",
        2,
        "inception",
        2,
        of_teacher=True,
        from_features=lambda _, student, prompts: inception_score(student["logits"]),
    ),
    "attributes": Metric(
        "attributes %",
        "higher",
        1,
        "probe",
        of_teacher=True,
        from_features=lambda _, student, prompts: attribute_accuracy(student["seen"], prompts),
    ),
}
