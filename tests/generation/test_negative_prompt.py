"""Negative prompts: the demo's against its stock pipeline, and where they would do nothing."""

import inspect
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import run
from support.slow import slow

from clear_dit.errors import RequestError
from clear_dit.families.table import all_families
from clear_dit.generation.models import DEMO, quiet_libraries
from clear_dit.generation.request import make_request
from clear_dit.generation.runner import PipelineRunner
from clear_dit.generation.stage_plan import StagePlanner

PROMPT, NEGATIVE = "a blue house by the sea", "a golden moon"
SMALL = {"height": 128, "width": 128, "steps": 2}


def request(**settings):
    return make_request(PROMPT, device="cpu", **SMALL | settings)


@pytest.fixture(scope="module")
def runner():
    return PipelineRunner.of(request())


@torch.no_grad()
def stock_image(negative):
    with quiet_libraries():
        pipe = diffusers.FluxPipeline.from_pretrained(DEMO)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        PROMPT,
        negative_prompt=negative,
        true_cfg_scale=2.0,
        height=SMALL["height"],
        width=SMALL["width"],
        num_inference_steps=SMALL["steps"],
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(0),
    ).images
    return np.array(made[0]).astype(int)


def pixels(runner, out, **settings):
    runner.generate(request(**settings), out)
    with Image.open(out) as image:
        return np.array(image).astype(int)


@slow
def test_the_demos_image_is_the_stock_pipelines_and_none_is_as_before(runner, tmp_path):
    full = {"attention": "full"}
    with_it = pixels(runner, tmp_path / "a.png", negative_prompt=NEGATIVE, **full)
    assert np.abs(with_it - stock_image(NEGATIVE)).max() <= 1
    without = pixels(runner, tmp_path / "b.png", **full)
    assert np.abs(without - stock_image("")).max() <= 1
    assert (with_it != without).mean() > 0.3
    np.testing.assert_array_equal(without, pixels(runner, tmp_path / "c.png", **full))
    empty = pixels(runner, tmp_path / "d.png", negative_prompt=" ", **full)
    np.testing.assert_array_equal(without, empty)


def test_without_guidance_it_is_refused():
    with pytest.raises(RequestError, match="--guidance 1 has none; take more than 1, or leave it"):
        request(negative_prompt=NEGATIVE, guidance=1)
    assert request(negative_prompt="", guidance=1).negative_prompt is None
    with pytest.raises(RequestError, match="--negative-prompt: a prompt must be text, got int"):
        request(negative_prompt=3)
    with pytest.raises(RequestError, match=r"--negative-prompt: .*control character U\+0007"):
        request(negative_prompt="a\a")


def test_of_guidance_that_is_a_part_of_the_model_it_is_refused(tmp_path, capsys):
    shutil.copytree(DEMO, tmp_path / "model")
    config = tmp_path / "model" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": True}))
    model = ("--model", tmp_path / "model")
    assert run("generate", PROMPT, *model, "--negative-prompt", NEGATIVE, "--dry-run") == 2
    told = capsys.readouterr().err
    assert "clear-dit: --negative-prompt: guidance of" in told
    assert told.endswith("has no second pass that takes a prompt; leave it out.\n")


def test_where_no_stage_has_guidance_it_is_refused(runner, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    settings = {"image": str(tmp_path / "small.png"), "negative_prompt": NEGATIVE}
    told = "which enlarging an image by --preset refine has not; take --preset repaint, or leave"
    refined = request(**settings, preset="refine")
    with pytest.raises(RequestError, match=told):
        StagePlanner("demo").plan(refined, (64, 64))
    with pytest.raises(RequestError, match=told):
        runner.generate(refined, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
    StagePlanner("demo").check_negative(request(**settings, preset="repaint"), (64, 64))


def test_which_pipelines_take_one_is_as_their_calls_are():
    for family in all_families():
        guidance = family.recipe.guidance
        for name in family.recipe.pipelines:
            pipeline = getattr(diffusers, name, None)
            if pipeline is None:
                continue
            if issubclass(pipeline, diffusers.ModularPipeline):
                takes = "negative_prompt" in pipeline().blocks.input_names
            else:
                takes = "negative_prompt" in inspect.signature(pipeline.__call__).parameters
            assert guidance.takes_negative({}, name) == takes, name
            assert not guidance.takes_negative({"guidance_embeds": True}, name)
