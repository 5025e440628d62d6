"""`clear-dit bench` of models in folders, and of steps with values, for every family."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from support.command_line import run
from support.families.folders import NATIVE, size_options, token_pixels
from support.families.models import FAMILIES, make_model
from support.families.pipelines import PIPELINES
from support.slow import few, slow

from clear_dit import Window, apply_clear
from clear_dit.attention.radii import Radii
from clear_dit.bench.configurations import find_configuration
from clear_dit.bench.step import TOLERANCE, output_of, relative_error
from clear_dit.counting.flops import config_of, count_flops
from clear_dit.counting.inputs import Random, model_inputs
from clear_dit.counting.pass_flops import PassFlops
from clear_dit.families.schedule import schedule_for
from clear_dit.families.table import attention_layers
from clear_dit.kernels.window import EVERYTHING

# Z-Image pads text to a multiple of 32; FLUX.3 takes multiples of 16.
TEXT = 32


@pytest.mark.parametrize("name", few(FAMILIES, "krea2"))
def test_a_step_with_values(name):
    """They are read as an image, and past the diagonal CLEAR is full attention."""
    model, window = make_model(name), Window(8, 12, TEXT, 3)
    inputs = model_inputs(model, window, Random(torch.float32, "cpu"))
    with torch.no_grad():
        full = output_of(model, inputs)
        assert full.isfinite().all()
        apply_clear(model, radius=20)
        assert relative_error(output_of(model, inputs), full) < TOLERANCE[torch.float32]
        apply_clear(model, radius=1)
        assert relative_error(output_of(model, inputs), full) > TOLERANCE[torch.float32]


@slow
@pytest.mark.parametrize("name", FAMILIES)
def test_two_counts_tell_those_of_any_size(name):
    config = config_of(make_model(name))
    flops = PassFlops.of(config, TEXT)
    for window in (Window(12, 16, TEXT, 3), Window(16, 8, TEXT, 4, far_levels=10)):
        rows = count_flops(config, window)["rows"]
        full, local = (1e12 * row["total_tflop"] for row in rows)
        assert flops.full(window.image_length) == pytest.approx(full, rel=1e-9)
        assert flops.local(window) == pytest.approx(local, rel=1e-9)


@slow
def test_a_schedule_is_counted_layer_by_layer():
    """As many FLOPs as the operators of the layers that it is applied to."""
    model, window = make_model("flux"), Window(12, 16, TEXT, 3)
    names = list(attention_layers(model))
    radii = dict(zip(names, [(EVERYTHING, 2), (3, 3), (2, 4), (5, EVERYTHING)], strict=True))
    schedule = schedule_for(model, Radii(3, (0.7,), tuple(radii.items())), far=False)
    flops = PassFlops.of(config_of(model), TEXT)
    uniform = [flops.local(window.with_radius(radius)) for radius in (2, 3, 4)]
    full = flops.full(window.image_length)
    early = flops.scheduled(window, schedule, 0.9)
    late = flops.scheduled(window, schedule, 0.5)
    linear = flops.linear(window.image_length)
    own = [one - linear for one in uniform]
    of_five = flops.local(window.with_radius(5)) - linear
    assert early == pytest.approx(linear + (full - linear + own[1] + own[0] + of_five) / 4)
    assert late == pytest.approx(linear + (own[0] + own[1] + own[2] + full - linear) / 4)


@slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_folder_is_planned(name, family_folder, capsys):
    folder, side = family_folder(name), token_pixels(name)
    size = size_options(name, 2 * NATIVE, 2 * NATIVE)
    options = ("--radius", 3, "--text-length", TEXT, "--json")
    assert run("bench", "plan", "--model", folder, *size, *options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["token_rows"], result["token_columns"]) == (2 * NATIVE, 2 * NATIVE)
    assert [row["stage"] for row in result["memory"]] == [
        "text encoding",
        *(f"denoising {px} x {px}" for px in (NATIVE * side, 2 * NATIVE * side)),
        f"decoding a tile of {2 * NATIVE * side} x {2 * NATIVE * side}",
    ]
    assert all(row["total_gib"] > 0 for row in result["memory"])


def test_of_a_repository_configurations_alone_are_fetched(family_folder, tmp_path, monkeypatch):
    folder = family_folder("sd3")
    fetched = []

    def fetch(repository, name, subfolder=None, revision=None):
        assert repository == "owner/sd3-tiny"
        fetched.append(f"{subfolder}/{name}")
        target = tmp_path / (subfolder or "") / name
        target.parent.mkdir(exist_ok=True)
        return shutil.copy(folder / (subfolder or "") / name, target)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    found = find_configuration("owner/sd3-tiny")
    assert found == find_configuration(str(folder))
    assert (found.token_pixels, found.native_size) == (4, 4 * NATIVE)
    assert len(found.text_encoders) == 3
    assert {name.rpartition("/")[2] for name in fetched} == {
        *("model_index.json", "config.json", "tokenizer_config.json")
    }


@pytest.mark.parametrize("name", few(["sd3", "z-image", "hunyuan-image"], "z-image"))
def test_a_step_is_measured(name, family_folder, capsys):
    size = size_options(name, 8, 12)
    options = ("--radius", 3, "--repeats", 1, "--json")
    assert run("bench", "denoise", "--model", family_folder(name), *size, *options) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["correct"]
    assert result["flops_allow"] > 1
