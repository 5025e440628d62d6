"""from_pipe both ways, and FLUX.1-schnell, which borrows the weights trained on FLUX.1-dev."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from support import models
from support.models import FAR, assert_differs, assert_same, dense_masks, image_mask, run

from clear_dit import CLEARFluxPipeline, CLEARProcessor, apply_clear, remove_clear
from clear_dit.pipelines.cascade.resolution import Resolution
from clear_dit.weights.format import parameters_by_key


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return models.draw(pipe, output_type="pt", **options)


def assert_close(images, expected):
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_from_pipe(tiny_pipeline):
    stock, as_trained = tiny_pipeline(FluxPipeline), lambda height, width: Resolution()
    source = {"image": torch.rand(1, 3, 24, 40), "strength": 1.0}
    full, full_again = draw(stock), draw(FluxImg2ImgPipeline.from_pipe(stock), **source)
    with dense_masks(image_mask(6, 10, radius=2, text=6)):
        expected = draw(stock)
        expected_again = draw(FluxImg2ImgPipeline.from_pipe(stock), **source)
    assert_differs(expected, full)
    clear = CLEARFluxPipeline.from_pipe(stock)
    clear.set_attn_processor(CLEARProcessor(radius=2, far=False))
    assert_close(draw(clear, resolution=as_trained), expected)
    again = FluxImg2ImgPipeline.from_pipe(clear)
    assert_close(draw(again, **source), expected_again)
    apply_clear(again, radius=FAR)  # one transformer, whichever pipeline holds it
    assert_close(draw(again, **source), full_again)
    assert_close(draw(clear, resolution=as_trained), full)
    assert remove_clear(stock)
    assert torch.equal(draw(stock), full)
    assert_close(draw(clear, resolution=as_trained), full)  # it decodes in its own layout


def test_schnell_takes_weights_of_dev(tiny_transformer, tiny_inputs, clear_weights):
    """It has no guidance embedding; the attention layers are alike."""
    schnell, inputs = tiny_transformer(), tiny_inputs(4, 6)
    dev = tiny_transformer(seed=1, guidance_embeds=True)
    assert schnell.config.guidance_embeds is False
    full = run(schnell, inputs)
    apply_clear(schnell, radius=2, weights=clear_weights)
    borrowed, lent = parameters_by_key(schnell), parameters_by_key(dev)
    assert borrowed.keys() == lent.keys()
    assert all(torch.equal(borrowed[key], lent[key]) for key in lent)
    received = run(schnell, inputs)
    stock = tiny_transformer()
    with torch.no_grad():
        for key, parameter in parameters_by_key(stock).items():
            parameter.copy_(lent[key])
    with dense_masks(image_mask(4, 6, radius=2)):
        assert_same(received, run(stock, inputs))
    apply_clear(schnell, radius=FAR)
    assert_same(run(schnell, inputs), run(stock, inputs))
    assert remove_clear(schnell)
    assert torch.equal(run(schnell, inputs), full)


def test_schnell_pipeline(tiny_pipeline, clear_weights):
    """Its scheduler has no dynamic shift; weights come and go through the pipeline."""
    pipe = tiny_pipeline(CLEARFluxPipeline)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    full = draw(pipe, guidance_scale=0.0)
    pipe.set_attn_processor(CLEARProcessor(radius=2))
    zero_shot = draw(pipe, guidance_scale=0.0)
    pipe.load_clear_weights(clear_weights)
    assert (draw(pipe, guidance_scale=0.0) - zero_shot).abs().max() > 1e-3
    assert remove_clear(pipe)
    assert torch.equal(draw(pipe, guidance_scale=0.0), full)


@pytest.mark.parametrize("wrong", [{"num_single_layers": 3}, {"num_attention_heads": 3}])
def test_weights_of_another_architecture(tiny_transformer, clear_weights, wrong):
    with pytest.raises(ValueError, match="holds weights for another model"):
        apply_clear(tiny_transformer(**wrong), radius=2, weights=clear_weights)
