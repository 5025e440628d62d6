"""CLEARPipeline of a modular pipeline: FLUX.3, which has no other; see also `test_families.py`."""

import logging
import shutil

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from support.families.models import make_model
from support.families.pipelines import make_pipeline
from support.models import FAR
from support.slow import slow

from clear_dit import CLEARPipeline, apply_clear
from clear_dit.families.flux3 import FAMILY

NATIVE = 16
FLUX3, DISTILLED = diffusers.Flux3ModularPipeline, diffusers.Flux3DistilledModularPipeline


def make(cls=FLUX3):
    pipe = make_pipeline("flux3", cls)
    if cls is DISTILLED:
        pipe.update_components(transformer=make_model("flux3", flow_map=True))
    return pipe


def clear(radius, cls=FLUX3):
    pipe = CLEARPipeline(make(cls), native_size=NATIVE)
    apply_clear(pipe, radius=radius)
    return pipe


def close(images, expected):
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)


def reference():
    pixels = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(2)) * 255
    return PIL.Image.fromarray(pixels.byte().numpy())


@slow
@pytest.mark.parametrize("cls", [FLUX3, DISTILLED])
def test_of_few_steps_and_with_reference_images(cls):
    pipe = clear(FAR, cls)
    assert isinstance(pipe, cls)
    plain = one(make(cls))
    expected = one(make(cls), image=reference())
    close(one(pipe), plain)
    close(one(pipe, image=reference()), expected)
    assert (expected - plain).abs().max() > 1e-3
    large = one(clear(3, cls), 8, 12, image=reference())
    assert large.isfinite().all()
    assert (large - one(clear(3, cls), 8, 12)).abs().max() > 1e-3


def one(pipe, rows=4, columns=4, **options):
    given = {"prompt": "a red house", "height": 4 * rows, "width": 4 * columns, "output_type": "np",
             "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0),
             "text_encoder_out_layers": (1,), **options}  # fmt: skip
    if not isinstance(pipe, DISTILLED):  # which has no guidance
        given = {"negative_prompt": "a house"} | given
    if isinstance(pipe, CLEARPipeline):
        return torch.as_tensor(pipe(**given).images)
    return torch.from_numpy(np.array(pipe(output="images", **given)))


def test_several_images_of_a_prompt():
    images = one(clear(3), 8, 8, num_images_per_prompt=2)
    assert images.shape == (2, 32, 32, 3)
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_ended_by_a_callback(caplog):
    pipe, steps = clear(3), []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True
        return {}

    images = one(pipe, 8, 8, callback_on_step_end=callback)
    assert images.shape == (1, 16, 16, 3)
    assert steps == [0]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_callback_gives_other_latents():
    def callback(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = one(clear(3), callback_on_step_end=callback, output_type="latent")
    assert latents.shape == (1, 16, 4)
    assert not latents.any()


def test_a_callback_that_wants_more():
    with pytest.raises(ValueError, match=r"callbacks get latents alone; got .*prompt_embeds"):
        one(clear(3), callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


def test_bars_say_the_stage(capsys):
    pipe = CLEARPipeline(make(), native_size=NATIVE)
    pipe.set_progress_bar_config(disable=False)
    one(pipe, 8, 8)
    shown = capsys.readouterr().err
    assert "stage 1 of 2, 16x16" in shown
    assert "stage 2 of 2, 32x32" in shown
    pipe.set_progress_bar_config(disable=True)
    one(pipe, 8, 8)
    assert "stage" not in capsys.readouterr().err


def test_saved_and_loaded(tmp_path):
    """Without the block that was taken out: no part of it is saved."""
    pipe = clear(3)
    pipe.scheduler = FLUX3().scheduler  # which blocks make: it is not saved
    expected = one(pipe, 8, 8)
    pipe.save_pretrained(tmp_path)
    again = CLEARPipeline.from_pretrained(tmp_path)
    assert again.native_size == NATIVE
    assert "prompt_upsampler" not in again.components
    apply_clear(again, radius=3)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(one(again, 8, 8), expected)


def test_parts_that_are_not_loaded(tmp_path):
    pipe = clear(3)
    pipe.save_pretrained(tmp_path)
    given = CLEARPipeline.from_pretrained(tmp_path, text_encoder=pipe.text_encoder, vae=None)
    assert given.text_encoder is pipe.text_encoder
    assert given.vae is None
    without = CLEARPipeline.from_pretrained(tmp_path, text_encoder=None)
    with pytest.raises(ValueError, match=r"text_encoder not loaded, which blocks of Flux3Modular"):
        one(without)


def test_a_part_that_cannot_be_loaded(tmp_path):
    make().save_pretrained(str(tmp_path), overwrite_modular_index=True)
    shutil.rmtree(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match="Unable to load text_encoder"):
        CLEARPipeline.from_pretrained(tmp_path)


def test_no_pipeline_at_all(tmp_path):
    with pytest.raises(OSError, match=r"model_index\.json"):
        CLEARPipeline.from_pretrained(tmp_path)


def test_a_list_of_one_prompt():
    pipe, lists = clear(3), {"prompt": ["a red house"], "negative_prompt": ["a house"]}
    generator = [torch.Generator().manual_seed(0)]
    assert torch.equal(one(pipe, 8, 8, generator=generator, **lists), one(pipe, 8, 8))


def test_several_prompts():
    with pytest.raises(ValueError, match="prompt must be one text, got a list of 2; call once for"):
        clear(3)(prompt=["a house", "the sea"])


def test_of_a_family_with_stock_pipelines():
    with pytest.raises(ValueError, match=r"takes FluxPipeline of FLUX.1 .*, got FluxModularPipel"):
        CLEARPipeline(make_pipeline("flux", diffusers.FluxModularPipeline))


def test_defaults():
    of_steps = FAMILY.recipe.defaults_of
    assert of_steps(make_model("flux3").config, {}) is None
    assert of_steps(make_model("flux3", flow_map=True).config, {}).steps == 16
    for cls, steps in ((FLUX3, 50), (DISTILLED, 16)):
        assert cls().default_call_parameters["num_inference_steps"] == steps
    assert FLUX3().guider.guidance_scale == FAMILY.recipe.defaults.guidance
    assert FLUX3().scheduler.config.shift == FAMILY.recipe.shift
