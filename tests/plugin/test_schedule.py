"""Schedule files: what they do, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from support.families.models import make_inputs, make_model, run

from clear_dit import apply_clear
from clear_dit.attention.radii import Radii
from clear_dit.families.schedule import MAX_BYTES, read_schedule, schedule_for, write_schedule
from clear_dit.families.table import attention_layers
from clear_dit.kernels.window import EVERYTHING


@pytest.fixture(scope="module")
def model():
    return make_model("flux")


@pytest.fixture
def schedule(model):
    names = list(attention_layers(model))
    radii = [(EVERYTHING, 2), (3, 2), (2, 4), (5, EVERYTHING)]
    return schedule_for(model, Radii(3, (0.5,), tuple(zip(names, radii, strict=True))), far=False)


def test_a_file_is_the_same_as_its_radii(model, schedule, tmp_path):
    path, inputs = tmp_path / "schedule.json", make_inputs("flux", 6, 8)
    write_schedule(schedule, path)
    assert read_schedule(path) == schedule
    apply_clear(model, schedule=path)
    for level in (0.7, 0.3):
        given = inputs | {"timestep": torch.tensor([level])}
        value = run(model, given)
        place = 0 if level > 0.5 else 1
        layers = {name: radii[place] for name, radii in schedule.layers}
        dense = [name for name, radius in layers.items() if radius == EVERYTHING]
        own = make_model("flux")
        apply_clear(own, {"*": 1, **layers}, far=False, dense_layers=dense)
        torch.testing.assert_close(value, run(own, given), rtol=1e-4, atol=2e-5)


def test_what_else_is_refused_beside_a_schedule(model, schedule, tmp_path):
    for other in ({"radius": 8}, {"dense_until": 0.5}, {"down_factor": 2}):
        with pytest.raises(ValueError, match=f"leave {next(iter(other))} out"):
            apply_clear(model, schedule=schedule, **other)
    with pytest.raises(ValueError, match="made for far=False, got far=True"):
        apply_clear(model, schedule=schedule, far=True)
    with pytest.raises(ValueError, match=r"of 5 x 16 channels, but this is a .* of 2 x 16"):
        apply_clear(model, schedule=replace(schedule, heads=5))
    with pytest.raises(ValueError, match=r"the model has no layer 'transformer_blocks\.1\.attn'"):
        apply_clear(make_model("flux", num_layers=1), schedule=schedule)
    with pytest.raises(ValueError, match=r"radius names 3 of 4 layers, and not transf"):
        apply_clear(model, schedule=replace(schedule, layers=schedule.layers[1:]))
    with pytest.raises(FileNotFoundError):
        apply_clear(model, schedule=tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\xff", "is not JSON"),
        ('{"format": NaN}', "is not JSON .NaN is no number"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ("[]", "is no schedule"),
        (" " * (MAX_BYTES + 1), "at most 1,048,576 bytes"),
        ({"format": "other"}, "is no schedule"),
        ({"version": 2}, "has version 2, this program reads 1"),
        ({"more": 1}, "the key 'more' is unknown"),
        ({"model": 5}, "model must be text, got 5"),
        ({"far": "yes"}, "far must be true or false, got 'yes'"),
        ({"heads": 0}, "heads must be an integer from 1 to"),
        ({"radius": True}, "radius must be an integer from 1 to"),
        ({"levels": [0.5, 0.7]}, "each below the one before"),
        ({"levels": [1.5]}, "noise levels from 1 to 0"),
        ({"levels": 0.5}, "noise levels from 1 to 0"),
        ({"levels": [0.5, 0.5]}, "each below the one before"),
        ({"levels": []}, "must have 1 radii, one for each interval"),
        ({"layers": {}}, "layers must name 1 to 4096 layers"),
        (
            {"layers": {"a": [2, "full"]}},
            "radius of 'a' must be an integer from 1 to .* got 'full'",
        ),
        ({"layers": {"a": [2, 0]}}, "radius of 'a' must be an integer from 1 to .* got 0"),
        ({"far": True, "layers": {"a": [2, 1]}}, "an integer from 2 to .* got 1"),
        ({"made": 5}, "made must be an object"),
    ],
)
def test_what_is_no_schedule(schedule, tmp_path, change, message):
    path = tmp_path / "schedule.json"
    text = change if isinstance(change, str) else json.dumps(schedule.as_json() | change)
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as found:
        read_schedule(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)
