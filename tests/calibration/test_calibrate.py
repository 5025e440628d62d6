"""Calibrating: the choice of radii, and the whole of it on the demo in small."""

import itertools

import numpy as np
import pytest
from support.families.models import make_inputs, make_model, run
from support.slow import slow

from clear_dit.calibration import search
from clear_dit.calibration.forwards import ForwardOf, predicted, relative_error
from clear_dit.calibration.measure import Measure
from clear_dit.calibration.request import make_calibrate_request, training_captions
from clear_dit.calibration.run import calibrate, report
from clear_dit.calibration.solve import least_error
from clear_dit.demo.probe import held_out_captions
from clear_dit.errors import RequestError
from clear_dit.families.schedule import read_schedule
from clear_dit.generation.image_output import read_settings
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import generate
from clear_dit.kernels.window import EVERYTHING
from clear_dit.plugin import apply_clear


def test_the_choice_is_the_best_of_all():
    rng = np.random.default_rng(0)
    errors, costs = rng.random((5, 4)), rng.integers(1, 9, (5, 4)).astype(float)
    for budget in (13.5, 17.5, 30.5, 45.5):  # between what choices cost: they are rounded
        chosen = least_error(errors, costs, budget)
        every = list(itertools.product(range(4), repeat=5))
        affordable = [c for c in every if sum(costs[i, x] for i, x in enumerate(c)) <= budget]
        least = min(sum(errors[i, x] for i, x in enumerate(c)) for c in affordable)
        assert sum(costs[i, x] for i, x in enumerate(chosen)) <= budget
        assert sum(errors[i, x] for i, x in enumerate(chosen)) == pytest.approx(least)
    assert least_error(errors, costs, costs.min(axis=1).sum() / 2) is None


@pytest.mark.parametrize("others", [EVERYTHING, 2])
def test_errors_of_changes_are_those_of_the_whole_model(others):
    """Replayed blocks change nothing, and the model's own radii neither."""
    model, inputs = make_model("flux"), make_inputs("flux", 6, 8)
    expected = run(model, inputs)
    measure, forward = Measure(model, 3, far=False), ForwardOf(0.5, inputs)
    about = dict.fromkeys(measure.names, others)
    apply_clear(model, 3, far=False, dense_until=0.9)
    found = measure.changes(forward, about, [[2, 4], *[[1, 4]] * (len(about) - 1)])
    for name, errors in zip(measure.names, found, strict=True):
        for radius, error in zip((2 if name == measure.names[0] else 1, 4), errors, strict=True):
            with measure.radii(about | {name: radius}):
                value = relative_error(predicted(model, forward), expected)
            assert error == pytest.approx(value, rel=1e-4)
            assert error > 1e-6
    apply_clear(model, {"*": 3}, far=False)
    assert measure.pairs(forward, [100])[0] == (6 * 8 + 5) ** 2


def test_prompts_are_not_those_of_evaluation():
    assert not set(training_captions(256)) & set(held_out_captions(256))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "--count must be from 1"),
        ({"budget": 0.0}, "--budget must be from 0.1 to 100"),
        ({"steps": 3}, "--intervals 4 of --points 1 forwards need as many --steps, got 3"),
        ({"intervals": 0}, "--intervals must be from 1 to 64"),
        ({"radius": 1, "far": True}, "far keys need a radius of at least 2"),
        ({"prompts": "none.txt"}, "none.txt"),
    ],
)
def test_what_is_refused(changes, message):
    given = {"model": "demo", "prompts": "demo", "count": 1} | changes
    with pytest.raises((RequestError, OSError), match=message):
        make_calibrate_request(**given).window  # noqa: B018


SMALL = {"height": 128, "width": 160, "steps": 4}


@slow
def test_the_demo_in_small(tmp_path):
    """With more FLOPs it errs less, on a prompt that had no part in it; an image is made so.

    With as many, so small an image and one prompt do not tell (benchmarks/calibrated.py).
    """
    out = tmp_path / "schedule.json"
    request = make_calibrate_request(
        "demo", "demo", 1, radius=3, far=False, budget=1.2, intervals=2, **SMALL
    )
    result = calibrate(request, out, progress=False)
    assert result["error"]["schedule"] < result["error"]["uniform"]
    assert 1 < result["flops"] <= 1.2
    assert "single_transformer_blocks.3.attn" in report(result)
    schedule = read_schedule(out)
    assert len({radius for _, radii in schedule.layers for radius in radii}) > 1
    image = tmp_path / "image.png"
    generate(make_request("a red house", schedule=str(out), **SMALL), image, progress=False)
    settings = read_settings(image)
    assert settings["schedule"]["layers"] == schedule.as_json()["layers"]
    assert settings["radius"] == 3


@slow
def test_what_is_no_better_is_not_written(tmp_path, monkeypatch):
    def uniform(errors, costs, shares, budget):
        best = [abs(cost - budget) for cost in costs]
        return [[best.index(min(best))] * errors.shape[1]] * errors.shape[0]

    monkeypatch.setattr(search, "solve", uniform)
    out = tmp_path / "schedule.json"
    request = make_calibrate_request(
        "demo", "demo", 1, radius=3, far=False, intervals=1, height=64, width=64, steps=2
    )
    monkeypatch.setattr(type(request), "radii", [3])
    result = calibrate(request, out, progress=False)
    assert result["out"] is None
    assert not out.exists()
    assert "no better" in report(result)
    assert result["error"]["schedule"] == pytest.approx(result["error"]["uniform"], rel=1e-3)
