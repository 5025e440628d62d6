"""Calls that end early, of stock pipelines that look for it and of those that do not."""

import pytest
import torch
from support.families.pipelines import PIPELINES, call_options, make_pipeline

from clear_dit import CLEARPipeline

# ERNIE-Image's gives its scheduler a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Has neither; has `interrupt`, but no callbacks; has both.
NAMES = ("ernie-image", "longcat-image", "flux2")


def latents(pipe, name, **options):
    side = 4 * PIPELINES[name][2]
    return pipe(
        prompt=["a red house", "the small house by the sea"], height=side, width=side,
        generator=torch.Generator().manual_seed(0), output_type="latent", cascade=False,
        **call_options(name) | {"num_inference_steps": 4} | options,
    ).images  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_call_ends_after_the_step(name):
    """With what that step left: the same as of a callback that notes it and goes on."""
    noted = []

    def note(pipe, step, timestep, tensors):
        noted.append(tensors["latents"].clone())
        return {}

    def end(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    pipe = CLEARPipeline(make_pipeline(name))
    scheduler = pipe.scheduler
    whole = latents(pipe, name, callback_on_step_end=note)
    assert len(noted) == 4
    assert torch.equal(whole, noted[-1])
    assert torch.equal(latents(pipe, name, callback_on_step_end=end), noted[1])
    assert torch.equal(latents(pipe, name), whole)
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize("name", NAMES)
def test_callbacks_change_latents(name):
    def zeros(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    pipe = CLEARPipeline(make_pipeline(name))
    changed = latents(pipe, name, callback_on_step_end=zeros)
    assert not changed.any()


def test_callbacks_that_ask_for_what_there_is_not():
    pipe = CLEARPipeline(make_pipeline("longcat-image"))
    with pytest.raises(ValueError, match=r"LongCatImagePipeline callbacks get latents alone; got "):
        latents(pipe, "longcat-image", callback_on_step_end_tensor_inputs=["prompt_embeds"])
