"""`--weights auto`: which weights a request gets, and that they are used and named."""

import logging

import pytest
import torch

from clear_dit import apply_clear, save_clear_weights
from clear_dit.generation.models import load_pipeline
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import generate
from clear_dit.weights import known
from clear_dit.weights.known import PUBLISHED, adapter_folder, known_weights
from clear_dit.weights.load import published_name

SMALL = {"height": 64, "width": 96, "steps": 1, "guidance": 1.0}


def ship(folder, far):
    """Weights for radius 2, twice the demo's, in a folder of adapters."""
    pipe = load_pipeline("demo", torch.float32, torch.device("cpu"), only_transformer=True)
    apply_clear(pipe, radius=2, far=far)
    with torch.no_grad():
        for block in pipe.transformer.single_transformer_blocks:
            block.attn.to_v.weight.mul_(2)
    file = folder / adapter_folder(2, 1, far) / published_name(2, 1, far)
    file.parent.mkdir(parents=True)
    save_clear_weights(pipe, file, base_model="demo")
    return file


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of adapters with one for radius 2, made for local attention."""
    monkeypatch.setattr(known, "DEMO_ADAPTERS", tmp_path / "adapters")
    return ship(known.DEMO_ADAPTERS, far=False)


def test_known_weights(shipped):
    assert known_weights("demo", 2, 1) == str(shipped)
    assert known_weights("demo", 3, 1) is None
    assert known_weights("demo", 2, 4) is None
    for model in ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"):
        assert known_weights(model, 16, 1) == PUBLISHED
        assert known_weights(model, 8, 4) == PUBLISHED
        assert known_weights(model, 7, 1) is None
        assert known_weights(model, 32, 4) is None  # never published
        assert known_weights(model, 16, 1, far=False) == PUBLISHED
        assert known_weights(model, 16, 1, far=True) is None
    assert known_weights("somebody/else", 16, 1) is None


def test_weights_made_for_far_keys_come_first(shipped):
    assert known_weights("demo", 2, 1, far=True) is None
    assert known_weights("demo", 2, 1, far=False) == str(shipped)
    made_for_far = ship(known.DEMO_ADAPTERS, far=True)
    assert (made_for_far.parent.name, made_for_far.name) == ("r2-far", "clear_far_2.safetensors")
    assert known_weights("demo", 2, 1) == str(made_for_far)
    assert known_weights("demo", 2, 1, far=True) == str(made_for_far)
    assert known_weights("demo", 2, 1, far=False) == str(shipped)


def test_auto_takes_the_fitting_weights_and_says_so(shipped, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="clear_dit")
    images = {}
    for name, weights in {"auto": None, "named": str(shipped), "none": "none"}.items():
        request = make_request("a house", radius=2, weights=weights, **SMALL)
        out = tmp_path / f"{name}.png"
        assert generate(request, out, progress=False)["weights"] == (
            None if name == "none" else shipped.name
        )
        assert (f"weights for demo, radius 2: {shipped.name}" in caplog.text) == (name == "auto")
        caplog.clear()
        images[name] = out.read_bytes()
    pixels = {name: image[image.index(b"IDAT") :] for name, image in images.items()}
    assert pixels["auto"] == pixels["named"] != pixels["none"]


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"radius": 3, "far": False}, True),
        ({"radius": 3}, False),  # far keys need none
        ({"radius": 3, "far": False, "weights": "none"}, False),
        ({"radius": 100}, False),  # the window covers the image
        ({"attention": "full"}, False),
    ],
)
def test_a_window_nobody_tuned_for_is_warned_about(shipped, tmp_path, caplog, settings, warns):
    request = make_request("a house", **settings, **SMALL)
    assert generate(request, tmp_path / "image.png", progress=False)["weights"] is None
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert any("no weights are known for demo" in one.getMessage() for one in warnings) == warns
