"""Which metrics can be computed here, and their values from the images on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

from ..errors import RequestError
from ..progress import bar_options
from .images import ImageSet
from .metrics import METRICS, MS_SSIM_ABOVE, PIXEL_METRICS, Features, names_attributes
from .request import EvaluateRequest, Variant

Values = dict[str, dict[str, float]]


def choose_metrics(
    request: EvaluateRequest, networks: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """The request's metrics that can be computed here, and why the others cannot.

    Raises:
        RequestError: torchmetrics is not installed; or one cannot be that was asked for by name.
    """
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise RequestError(
            "evaluate needs torchmetrics; install it with `pip install 'clear-dit[metrics]'`."
        ) from error
    reasons = {name: _missing(name, request, networks) for name in request.metrics}
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    if left_out and request.explicit:
        name, reason = next(iter(left_out.items()))
        raise RequestError(f"--metrics {name}: {reason}.")
    return [name for name in request.metrics if name not in left_out], left_out


def _missing(name: str, request: EvaluateRequest, networks: Mapping[str, Any]) -> str | None:
    metric = METRICS[name]
    if len(request.prompts) < metric.least:
        return f"needs {metric.least} images or more"
    least_side = min(request.generation.height, request.generation.width)
    if name == "ms_ssim" and least_side <= MS_SSIM_ABOVE:
        return f"needs images of more than {MS_SSIM_ABOVE} px a side"
    if metric.network is not None and (reason := networks[metric.network].missing()) is not None:
        return reason
    if name == "attributes" and not names_attributes(request.prompts):
        return "no prompt names an attribute of the demo's world"
    return None


def measure(
    request: EvaluateRequest,
    sets: Mapping[str, ImageSet],
    names: list[str],
    networks: Mapping[str, Any],
    progress: bool = True,
) -> Values:
    """The values of the metrics that are computed from images.

    Args:
        request: whose first variant is the teacher.
        sets: the complete images of every variant, by the variant's folder.
        names: metrics that `choose_metrics` chose.
        networks: by name; one after the other is loaded, and let go.
        progress: show bars on standard error.

    Returns:
        {variant's folder: {metric: value}}.
    """
    teacher, *students = request.variants
    device = torch.device(request.generation.device)
    values: Values = {variant.folder: {} for variant in request.variants}
    pair_measures = {name: PIXEL_METRICS[name] for name in names if name in PIXEL_METRICS}
    if "lpips" in names:
        pair_measures["lpips"] = networks["lpips"].pair_measure(device)
    for student in students if pair_measures else []:
        sums = dict.fromkeys(pair_measures, 0.0)
        # One pair at a time: the windows of SSIM multiply the memory of an image.
        pairs = zip(sets[teacher.folder].batches(1), sets[student.folder].batches(1), strict=True)
        bar = _bar(pairs, len(request.prompts), f"pixels: {student.label}", progress)
        for pair in bar:
            one, other = (images.to(device).float() / 255 for images in pair)
            for name, function in pair_measures.items():
                sums[name] += float(function(one, other).sum())
        means = {name: total / len(request.prompts) for name, total in sums.items()}
        values[student.folder].update(means)
    by_network: dict[str, list[str]] = {}
    for name in names:
        if METRICS[name].from_features is not None:
            by_network.setdefault(str(METRICS[name].network), []).append(name)
    for network_name, metrics in by_network.items():
        network = networks[network_name]
        network.load(device)
        features = {
            variant.folder: _features(request, variant, sets, network, progress)
            for variant in request.variants
        }
        for variant in request.variants:
            for name in metrics:
                metric = METRICS[name]
                assert metric.from_features is not None
                if metric.of_teacher or variant is not teacher:
                    values[variant.folder][name] = metric.from_features(
                        features[teacher.folder], features[variant.folder], request.prompts
                    )
    return values


def _features(
    request: EvaluateRequest,
    variant: Variant,
    sets: Mapping[str, ImageSet],
    network: Any,
    progress: bool,
) -> Features:
    batch = request.batch
    steps = -(-len(request.prompts) // batch)
    parts: dict[str, list[torch.Tensor]] = {}
    bar = _bar(sets[variant.folder].batches(batch), steps, f"features: {variant.label}", progress)
    for index, images in enumerate(bar):
        prompts = request.prompts[index * batch : (index + 1) * batch]
        for key, value in network.features(images, prompts).items():
            parts.setdefault(key, []).append(value)
    return {key: torch.cat(tensors) for key, tensors in parts.items()}


def _bar(items: Any, total: int, title: str, progress: bool) -> Any:
    return tqdm(items, title, total=total, **bar_options(progress))
