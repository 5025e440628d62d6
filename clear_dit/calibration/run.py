"""Calibrate: measure layers on the model's own trajectories, choose their radii, check the whole.

What is found on some trajectories is measured on others, beside the uniform window.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..attention.radii import Radii
from ..errors import RequestError
from ..families.schedule import schedule_for, write_schedule
from ..families.table import transformer_of
from ..files import check_writable
from ..generation.checks import find_device, find_dtype
from ..generation.models import load_pipeline
from ..kernels.window import EVERYTHING
from ..plugin import remove_clear
from ..progress import bar_options
from ..versions import __version__
from .forwards import Trajectory, forwards_of
from .measure import Measure
from .request import CalibrateRequest
from .search import Search


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
    bar = tqdm(request.prompts, "trajectories", unit="image", **bar_options(progress))
    trajectories = []
    for index, prompt in enumerate(bar):
        forwards, _ = forwards_of(pipe, generation, prompt, generation.seed + index)
        trajectories.append(Trajectory(forwards, request.intervals, request.points))
    number = len(trajectories) - request.check
    measured, checks = trajectories[:number], trajectories[number:]
    model = transformer_of(pipe, "calibrate")
    base, far = generation.radius, request.far
    try:
        measure, radii = Measure(model, base, far), [*request.radii, EVERYTHING]
        costs = measure.pairs(measured[0].forwards[0], radii)
        budget = request.budget * costs[radii.index(base)]
        found = Search(measure, measured, radii, costs, budget, base, progress).find()
        by_interval = {
            name: measure.whole(kind, checks).mean(axis=0)
            for name, kind in (("uniform", Radii(base)), ("schedule", found))
        }
    except ValueError as refused:
        raise RequestError(str(refused)) from refused
    finally:
        remove_clear(model)
    cost, shares = dict(zip(radii, costs, strict=True)), np.array(measured[0].shares)
    rows = [found.of_layer(name) for name in measure.names]
    spent = np.array([[cost[radius] for radius in row] for row in rows])
    flops = float((spent * shares).sum(axis=1).mean()) / cost[base]
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
