"""One pipeline that generates many requests: each as if it were the only one."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from support.slow import slow_but

from clear_dit.errors import RequestError
from clear_dit.families.table import transformer_of
from clear_dit.generation.image_output import read_settings
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import PipelineRunner, Stopped, generate

PROMPT = "a red house on a hill"
SMALL = {"height": 64, "width": 96, "steps": 1, "radius": 2, "weights": "none", "device": "cpu"}


@pytest.fixture(scope="module")
def runner():
    return PipelineRunner("demo", "float32", "cpu")


@pytest.fixture
def request_of():
    def make(**changes):
        return make_request(PROMPT, **(SMALL | changes))

    return make


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def test_every_image_is_as_if_it_were_the_only_one(runner, request_of, tmp_path):
    requests = [
        request_of(radius=4, weights="auto"),
        request_of(attention="full"),
        request_of(),
        request_of(radius=8, weights="auto", seed=1),
        request_of(attention="full"),
        request_of(radius=4, weights="auto"),
    ]
    for index, request in enumerate(requests):
        runner.generate(request, tmp_path / f"{index}.png")
    generated = [pixels(tmp_path / f"{index}.png") for index in range(len(requests))]
    for index in (0, 2, 3):
        generate(requests[index], tmp_path / "alone.png", progress=False)
        np.testing.assert_array_equal(pixels(tmp_path / "alone.png"), generated[index])
    np.testing.assert_array_equal(generated[1], generated[4])
    np.testing.assert_array_equal(generated[0], generated[5])
    assert len({image.tobytes() for image in generated[:4]}) == 4


def test_far_keys_where_nothing_else_is_made_for_the_model(runner, request_of, tmp_path, caplog):
    caplog.set_level("INFO", logger="clear_dit")
    told = {}
    for name, changes in {
        "none": {},
        "unknown": {"radius": 3, "weights": "auto"},
        "known": {"radius": 8, "weights": "auto"},
        "known far": {"radius": 4, "weights": "auto"},
        "asked": {"radius": 8, "weights": "auto", "far": True},
        "refused": {"far": False},
        "pooled": {"down_factor": 2},
        "full": {"attention": "full"},
    }.items():
        result = runner.generate(request_of(**changes), tmp_path / f"{name}.png")
        told[name] = result["far"], read_settings(tmp_path / f"{name}.png")["far"]
    assert {name for name, far in told.items() if far == (True, True)} == {
        *("none", "unknown", "known far", "asked")
    }
    assert all(far in ((True, True), (False, False)) for far in told.values())
    images = {name: pixels(tmp_path / f"{name}.png").tobytes() for name in told}
    assert images["none"] != images["refused"]
    assert images["known"] != images["asked"]
    assert any(
        "the model's own are taken, every token sees the whole" in m for m in caplog.messages
    )
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_the_model_gets_its_own_weights_back(runner, request_of, tmp_path):
    model = transformer_of(runner.pipe, "test")
    runner.generate(request_of(attention="full"), tmp_path / "out.png")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runner.generate(request_of(radius=4, weights="auto"), tmp_path / "out.png")
    assert any(not torch.equal(before[n], t) for n, t in model.state_dict().items() if n in before)
    runner.generate(request_of(attention="full"), tmp_path / "out.png")
    assert set(before) == set(model.state_dict())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_steps_are_told_with_their_stage(runner, request_of, tmp_path):
    image = tmp_path / "start.png"
    runner.generate(request_of(height=64, width=64), image)
    steps = []
    request = request_of(height=256, width=256, image=str(image), steps=8, strength=(0.5,))
    runner.generate(request, tmp_path / "out.png", on_step=steps.append)
    stages = {}
    for told in steps:
        stages.setdefault((told.stage, told.stages, told.height, told.width), []).append(told)
    assert list(stages) == [(1, 2, 128, 128), (2, 2, 256, 256)]
    for told in stages.values():
        assert len(told) > 1
        assert [one.step for one in told] == list(range(1, told[0].steps + 1))
        sigmas = [one.sigma for one in told]
        assert sigmas[0] < 0.5
        assert sigmas == sorted(sigmas, reverse=True)
        assert sigmas[-1] == 0
    assert steps[0].latents.shape == (1, 64, runner.pipe.transformer.config.in_channels)
    assert runner.pipe.stages == ()


def test_a_step_tells_the_image_that_is_coming(runner, request_of, tmp_path):
    steps = []
    runner.generate(request_of(steps=6), tmp_path / "out.png", on_step=steps.append)
    final = steps[-1].latents
    errors = []
    for before, now in pairwise(steps):
        slope = (now.latents - before.latents) / (now.sigma - before.sigma)
        coming = now.latents - now.sigma * slope
        errors.append(float((coming - final).square().mean()))
    assert errors[-1] < 1e-10
    noisy = float((steps[1].latents - final).square().mean())
    assert errors[0] < noisy


@pytest.mark.parametrize("after", slow_but([1, 3], 1))
def test_stops_in_the_middle_of_denoising_and_generates_again(runner, request_of, tmp_path, after):
    request, steps = request_of(steps=5), []
    with pytest.raises(Stopped):
        runner.generate(
            request,
            tmp_path / "out.png",
            on_step=steps.append,
            should_stop=lambda: len(steps) == after,
        )
    assert len(steps) == after
    assert list(tmp_path.iterdir()) == []
    runner.generate(request, tmp_path / "out.png")
    generate(request, tmp_path / "alone.png", progress=False)
    np.testing.assert_array_equal(pixels(tmp_path / "out.png"), pixels(tmp_path / "alone.png"))


def test_stops_while_it_decodes(runner, request_of, tmp_path):
    asked = []

    def should_stop():
        asked.append(True)
        return len(asked) == 2  # after the only step, then at the first strip

    with pytest.raises(Stopped):
        runner.generate(request_of(), tmp_path / "out.png", should_stop=should_stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory. Tried to allocate"), MemoryError()]
)
def test_too_little_memory_is_told_and_harms_no_other(runner, request_of, tmp_path, error):
    def fail(step):
        raise error

    with pytest.raises(MemoryError, match=r"96 x 64 px do not fit into the memory of cpu") as told:
        runner.generate(request_of(), tmp_path / "out.png", on_step=fail)
    assert told.value.__context__ is None  # its traceback would keep the tensors
    assert list(tmp_path.iterdir()) == []
    assert runner.generate(request_of(), tmp_path / "out.png")["impl"] != "full"


def test_weights_that_do_not_fit_leave_the_stock_model(runner, request_of, tmp_path):
    runner.generate(request_of(attention="full"), tmp_path / "expected.png")
    runner.generate(request_of(radius=4, weights="auto"), tmp_path / "out.png")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(RequestError, match=r"bad\.safetensors"):
        runner.generate(request_of(weights=str(tmp_path / "bad.safetensors")), tmp_path / "no.png")
    runner.generate(request_of(attention="full"), tmp_path / "out.png")
    np.testing.assert_array_equal(pixels(tmp_path / "out.png"), pixels(tmp_path / "expected.png"))


def test_notes_stand_in_the_image(runner, request_of, tmp_path):
    result = runner.generate(request_of(), tmp_path / "out.png", notes={"job": "abc"})
    settings = read_settings(tmp_path / "out.png")
    assert settings["job"] == "abc"
    assert settings["prompt"] == PROMPT
    assert set(result["seconds"]) == {"total", "text", "denoise", "decode"}


def test_unknown_weights_are_told_once(runner, request_of, tmp_path, caplog):
    request = request_of(radius=3, far=False, weights="auto", height=128)
    for seed in (0, 1):
        runner.generate(replace(request, seed=seed), tmp_path / "out.png")
    assert sum("no weights are known" in text for text in caplog.messages) == 1
    assert "images; take far keys with --far, or name weights" in caplog.text


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"radius": 1}, "take far keys with --radius 2 or more"),
        ({"radius": 3, "down_factor": 2}, "leave out --down-factor to take far keys"),
    ],
)
def test_unknown_weights_are_told_with_a_way_that_works(
    runner, request_of, caplog, changes, advice
):
    runner._find_weights(request_of(weights="auto", height=128, **changes))
    assert f"images; {advice}, or name weights" in caplog.text


def test_another_model_needs_another_runner(runner, request_of, tmp_path):
    with pytest.raises(ValueError, match=r"dtype is 'float32' here.*make another PipelineRunner"):
        runner.generate(request_of(dtype="bfloat16"), tmp_path / "out.png")
