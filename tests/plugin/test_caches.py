"""Caches of diffusers that skip blocks: what is computed is local, what is skipped is the same."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline, TaylorSeerCacheConfig
from support.models import (
    FAR,
    assert_differs,
    assert_same,
    by_definition,
    dense_masks,
    draw,
    image_mask,
    run,
)

from clear_dit import CLEARFluxPipeline, CLEARProcessor, apply_clear
from clear_dit.pipelines.cascade.resolution import Resolution

CONFIGURATIONS = {
    "first block, all skipped": lambda: FirstBlockCacheConfig(threshold=10.0),
    "first block, none skipped": lambda: FirstBlockCacheConfig(threshold=0.0),
    "Taylor": lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
}


def four_steps(model, inputs, config=None):
    """Predictions at four timesteps, in one context of the cache."""
    if config is not None:
        model.enable_cache(config)
    with model.cache_context("cond"):
        steps = [
            run(model, inputs | {"timestep": torch.full((1,), 1 - 0.2 * step)}) for step in range(4)
        ]
    if config is not None:
        model.disable_cache()
    return torch.stack(steps)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("cache_first", [True, False])
@pytest.mark.parametrize("far", [False, True])
def test_caches(tiny_transformer, tiny_inputs, name, cache_first, far):
    make, inputs = CONFIGURATIONS[name], tiny_inputs(4, 6)
    stock, model = tiny_transformer(), tiny_transformer()
    full = four_steps(stock, inputs, make())
    with by_definition(4, 6, 2, far):
        expected, uncached = four_steps(stock, inputs, make()), four_steps(stock, inputs)
    assert_differs(expected, full)
    if "none" in name:
        assert_same(expected, uncached)
    else:
        assert_differs(expected, uncached)  # the cache acts
    if cache_first:
        model.enable_cache(make())
        apply_clear(model, radius=2, far=far)
        model.disable_cache()
    else:
        apply_clear(model, radius=2, far=far)
    assert_same(four_steps(model, inputs, make()), expected)
    apply_clear(model, radius=FAR)
    assert_same(four_steps(model, inputs, make()), full)
    assert_same(four_steps(model, inputs), four_steps(stock, inputs))


def test_pipeline_with_true_guidance(tiny_pipeline):
    """Two passes, each with a cache of its own."""

    def guided(pipe, **options):
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        options |= {"negative_prompt": "the sea", "true_cfg_scale": 2.0}
        images = draw(pipe, num_inference_steps=4, output_type="pt", **options)
        pipe.transformer.disable_cache()
        return images

    with dense_masks(image_mask(6, 10, radius=2, text=6)):
        expected = guided(tiny_pipeline(FluxPipeline))
    pipe, as_trained = tiny_pipeline(CLEARFluxPipeline), lambda height, width: Resolution()
    pipe.set_attn_processor(CLEARProcessor(radius=2, far=False))
    torch.testing.assert_close(guided(pipe, resolution=as_trained), expected, rtol=0, atol=1e-5)
