"""Calibrate: measure layers on the model's own trajectories, choose their radii, check the whole.

Errors of layers add up only about: with far keys to within a few percent of all layers' together,
without them to twice that (demo, radius 4); and they differ from prompt to prompt. So several
schedules are solved for, bolder and more careful ones, and measured as a whole on the same
trajectories; the best is measured on others, beside the uniform window.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..attention.radii import Radii
from ..errors import RequestError
from ..families.schedule import schedule_for, write_schedule
from ..families.table import transformer_of
from ..files import check_writable
from ..generation.checks import find_device, find_dtype
from ..generation.models import load_pipeline
from ..kernels.window import EVERYTHING
from ..plugin import apply_clear, remove_clear
from ..versions import __version__
from .forwards import ForwardOf, forwards_of, predicted, relative_error
from .measure import LayerErrors, pairs
from .request import CalibrateRequest
from .solve import least_error

# How many times the uniform radius a layer's may be, or what part of it; the first is no bound.
SPREADS = (np.inf, 2.0, 1.5)


class Trajectory:
    """The forwards of one image, and which of them stand for every interval of noise levels."""

    def __init__(self, forwards: Sequence[ForwardOf], request: CalibrateRequest) -> None:
        self.forwards = forwards
        bounds = np.linspace(0, len(forwards), request.intervals + 1).round().astype(int)
        self.intervals = [forwards[start:stop] for start, stop in itertools.pairwise(bounds)]
        # Evenly within each interval, at the middle of as many parts.
        self.points = [
            [
                part[int((place + 0.5) * len(part) / request.points)]
                for place in range(request.points)
            ]
            for part in self.intervals
        ]

    @property
    def levels(self) -> tuple[float, ...]:
        """Between the intervals: the middle of the neighbours' noise levels."""
        pairs_of = zip(self.intervals, self.intervals[1:], strict=False)
        return tuple(round((one[-1].level + two[0].level) / 2, 4) for one, two in pairs_of)

    @property
    def shares(self) -> list[float]:
        """Of the steps in every interval."""
        return [len(part) / len(self.forwards) for part in self.intervals]


def calibrate(request: CalibrateRequest, out: Path, progress: bool = True) -> dict[str, Any]:
    """Find a schedule and write it, if it is better than the uniform window.

    Args:
        out: the JSON file to write.
        progress: show bars on standard error.

    Returns:
        out (None where nothing was written), model, radius, far, budget, levels, layers (radii by
        layer), flops (of attention, 1 for the uniform window's), error {uniform, schedule}: mean
        relative squared errors of the prediction on trajectories of their own; by_interval, the
        same by interval; seconds.

    Raises:
        RequestError: what cannot be calibrated.
        OSError: the file cannot be written.
    """
    check_writable(out, (".json",))
    start = time.perf_counter()
    generation = request.generation
    device = find_device(generation.device)
    pipe = load_pipeline(generation.model, find_dtype(generation.dtype), device)
    pipe.set_progress_bar_config(disable=True)
    bar = tqdm(request.prompts, "trajectories", unit="image", disable=not progress)
    trajectories = [
        Trajectory(forwards_of(pipe, generation, prompt, generation.seed + index)[0], request)
        for index, prompt in enumerate(bar)
    ]
    number = len(trajectories) - request.check
    measured, checks = trajectories[:number], trajectories[number:]
    model = transformer_of(pipe, "calibrate")
    base, far = generation.radius, request.far
    try:
        apply_clear(pipe, radius=base, far=far)
        layers, radii = LayerErrors(model), [*request.radii, EVERYTHING]
        measure = Measure(pipe, model, far)
        uniform = measure.whole(Radii(base), measured)
        weights = 1 / uniform.mean(axis=1)  # every trajectory counts the same
        errors = _errors(layers, measured, weights, radii, progress)
        costs = pairs(model, measured[0].points[0][0], radii)
        budget = request.budget * costs[radii.index(base)]
        shares = np.array(measured[0].shares)
        candidates = {
            schedule: measure.whole(schedule, measured)
            for schedule in _candidates(
                layers.layers, errors, costs, measured[0], base, radii, budget
            )
        }
        found = min(candidates, key=lambda one: float(weights @ (candidates[one] @ shares)))
        by_interval = {
            name: measure.whole(kind, checks).mean(axis=0)
            for name, kind in (("uniform", Radii(base)), ("schedule", found))
        }
    except ValueError as refused:
        raise RequestError(str(refused)) from refused
    finally:
        remove_clear(pipe)
    cost = dict(zip(radii, costs, strict=True))
    spent = [shares @ [cost[radius] for radius in found.of_layer(name)] for name in layers.layers]
    flops = float(np.mean(spent)) / cost[base]
    error = {name: float(shares @ values) for name, values in by_interval.items()}
    made = {
        "with": f"clear-dit {__version__}",
        "model": generation.model,
        "budget": request.budget,
        "flops": flops,
        "height": generation.height,
        "width": generation.width,
        "steps": generation.steps,
        "guidance": generation.guidance,
        "prompts": len(measured),
        "seed": generation.seed,
        "error": error,
        "by_interval": {name: [float(x) for x in values] for name, values in by_interval.items()},
    }
    schedule = schedule_for(model, found, far, made)
    better = error["schedule"] < error["uniform"]
    if better:
        write_schedule(schedule, out)
    return {
        "out": str(out) if better else None,
        **made,
        "radius": base,
        "far": far,
        "levels": list(schedule.levels),
        "layers": schedule.as_json()["layers"],
        "seconds": round(time.perf_counter() - start, 1),
    }


class Measure:
    """Measures schedules as a whole.

    Args:
        pipe, model: that run CLEAR, with any radii.
        far: whether with far keys.
    """

    def __init__(self, pipe: Any, model: Any, far: bool) -> None:
        self._pipe, self._model, self._far = pipe, model, far
        self._expected: dict[int, torch.Tensor] = {}  # by the forward

    def whole(self, radii: Radii, trajectories: Sequence[Trajectory]) -> np.ndarray:
        """Mean relative squared errors of the prediction, (trajectories, intervals)."""
        forwards = [one for each in trajectories for part in each.points for one in part]
        apply_clear(self._pipe, radius=radii, far=self._far)
        layers = LayerErrors(self._model)
        with layers.radii({}):
            for forward in forwards:
                if id(forward) not in self._expected:
                    self._expected[id(forward)] = predicted(self._model, forward).cpu()
        found = [
            [np.mean([self._error(forward) for forward in part]) for part in each.points]
            for each in trajectories
        ]
        return np.array(found)

    def _error(self, forward: ForwardOf) -> float:
        value = predicted(self._model, forward).cpu()
        return relative_error(value, self._expected[id(forward)])


def _errors(
    layers: LayerErrors,
    trajectories: Sequence[Trajectory],
    weights: Sequence[float],
    radii: Sequence[int],
    progress: bool,
) -> np.ndarray:
    """Weighted means of squared errors, (layers, intervals, radii), the last of which is full."""
    points = trajectories[0].points
    total = np.zeros((len(layers.layers), len(points), len(radii)))
    steps = len(trajectories) * sum(map(len, points)) * len(layers.layers) * (len(radii) - 1)
    with tqdm(total=steps, desc="layers", unit="forward", disable=not progress) as bar:
        for trajectory, weight in zip(trajectories, weights, strict=True):
            for interval, part in enumerate(trajectory.points):
                for forward in part:
                    found = np.array(layers.of(forward, radii[:-1], lambda: bar.update()))
                    total[:, interval, :-1] += weight * found / len(part)
    return total / len(trajectories)


def _candidates(
    layers: Sequence[str],
    errors: np.ndarray,
    costs: Sequence[float],
    trajectory: Trajectory,
    base: int,
    radii: Sequence[int],
    budget: float,
) -> list[Radii]:
    """Schedules of least summed error, by how far radii may be from the uniform one; and that."""
    everywhere = tuple((name, (base,)) for name in layers)
    found = {Radii(base, (), everywhere): None} if budget >= costs[radii.index(base)] else {}
    for spread in SPREADS:
        kept = [i for i, one in enumerate(radii) if base / spread <= one <= base * spread]
        if spread == SPREADS[0]:
            kept = list(range(len(radii)))
        some = [costs[i] for i in kept]
        if budget < min(some):
            continue
        for intervals in (True, False):
            of_kept = errors[:, :, kept]
            shares = trajectory.shares
            if not intervals:
                of_kept = np.tensordot(shares, of_kept, (0, 1))[:, None]
                shares = [1.0]
            chosen = solve(of_kept, some, shares, budget)
            by_layer = [tuple(radii[kept[choice]] for choice in row) for row in chosen]
            levels = trajectory.levels if intervals else ()
            found[Radii(base, levels, tuple(zip(layers, by_layer, strict=True)))] = None
    return list(found)


def solve(
    errors: np.ndarray, costs: Sequence[float], shares: Sequence[float], budget: float
) -> list[list[int]]:
    """The choice of radius for every layer and interval, (layers, intervals).

    Args:
        errors: (layers, intervals, radii).
        costs: of every radius, in one layer and step.
        shares: of the steps, in every interval.
        budget: for a layer and step, in the mean.
    """
    layers, intervals, _ = errors.shape
    groups = [(layer, interval) for layer in range(layers) for interval in range(intervals)]
    found = least_error(
        [shares[interval] * errors[layer, interval] for layer, interval in groups],
        [[shares[interval] * cost for cost in costs] for _, interval in groups],
        budget * layers,
    )
    return [found[layer * intervals : (layer + 1) * intervals] for layer in range(layers)]


def report(result: dict[str, Any]) -> str:
    """A table of the radii, and how good they are."""
    levels = [1.0, *result["levels"], 0.0]
    heads = [f"{high:.2f}-{low:.2f}" for high, low in itertools.pairwise(levels)]
    width = max(len(name) for name in result["layers"])
    lines = ["radius by layer and noise level".ljust(width) + "".join(f"{h:>12}" for h in heads)]
    lines += [
        name.ljust(width) + "".join(f"{radius:>12}" for radius in radii)
        for name, radii in result["layers"].items()
    ]
    error = result["error"]
    ratio = error["schedule"] / error["uniform"]
    verdict = "" if result["out"] else "; no better, so that nothing was written"
    lines.append(
        f"relative squared error of the prediction, radius {result['radius']} everywhere "
        f"{error['uniform']:.5f}, so {error['schedule']:.5f} ({ratio:.2f} times) at "
        f"{result['flops']:.3f} times the FLOPs of attention{verdict}"
    )
    return "\n".join(lines)
