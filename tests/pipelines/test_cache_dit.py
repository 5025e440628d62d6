"""cache-dit on a transformer under CLEAR: what it computes is local, each stage begins anew.

Tiny random FLUX, a token is 4 x 4 pixels.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline
from support.families.pipelines import make_pipeline
from support.models import assert_differs, by_definition, draw
from support.slow import slow

from clear_dit import CLEARFluxPipeline, CLEARPipeline, apply_clear
from clear_dit.pipelines.cascade.resolution import Resolution
from clear_dit.pipelines.cascade.step_caches import check_caches

pytestmark = slow


@pytest.fixture
def enabled():
    """A function that gives a transformer a cache which skips what it can after a step."""
    import cache_dit

    def enable(model, **options):
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=10.0, **options
        )
        cache_dit.enable_cache(model, cache_config=config)
        return lambda: cache_dit.disable_cache(model)

    return enable


def in_either_order(pipe, cache_first, enabled, **options):
    if cache_first:
        disable = enabled(pipe.transformer)
    apply_clear(pipe, radius=2, **options)
    return disable if cache_first else enabled(pipe.transformer)


@pytest.mark.parametrize("pipeline", [FluxPipeline, CLEARFluxPipeline])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("cache_first", [True, False])
def test_as_with_dense_attention(pipeline, far, cache_first, tiny_pipeline, enabled):
    options = {"num_inference_steps": 5, "output_type": "pt"}
    with by_definition(6, 10, 2, far, text=6):
        stock = tiny_pipeline(FluxPipeline)
        plain = draw(stock, **options)
        enabled(stock.transformer)
        expected = draw(stock, **options)
    assert_differs(expected, plain)
    if pipeline is CLEARFluxPipeline:
        options["resolution"] = lambda height, width: Resolution()
    pipe = tiny_pipeline(pipeline)
    disable = in_either_order(pipe, cache_first, enabled, far=far)
    torch.testing.assert_close(draw(pipe, **options), expected, rtol=0, atol=1e-5)
    disable()
    torch.testing.assert_close(draw(pipe, **options), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache_first", [True, False])
def test_each_stage_begins_anew(cache_first, tiny_pipeline, enabled):
    pipe = CLEARFluxPipeline.from_pipe(tiny_pipeline(FluxPipeline), native_size=16)
    stages = []

    def generate(**options):
        size = {"height": 24, "width": 36, "strength": 0.85}
        return draw(pipe, num_inference_steps=5, output_type="latent", **size | options)

    apply_clear(pipe, radius=2)
    plain = generate()
    other = CLEARFluxPipeline.from_pipe(tiny_pipeline(FluxPipeline), native_size=16)
    pipe, before = other, pipe
    disable = in_either_order(pipe, cache_first, enabled)
    counter = pipe.transformer.transformer_blocks[1].ff.register_forward_hook(
        lambda *_: stages.append(pipe.stage.name)
    )
    cached = generate()
    counter.remove()
    assert stages == ["20x12", "36x24"]  # in the first step alone of each
    assert not torch.allclose(cached, plain, atol=1e-3)

    def fail(*_):
        raise KeyError("enough")

    with pytest.raises(KeyError):
        generate(height=12, width=20, callback_on_step_end=fail)
    assert torch.equal(generate(), cached)
    disable()
    assert torch.equal(generate(), plain)
    pipe = before
    assert torch.equal(generate(), plain)


def test_refusals(tiny_pipeline, enabled):
    pipe = CLEARPipeline(tiny_pipeline(FluxPipeline))
    disable = enabled(pipe.transformer)
    with pytest.raises(
        ValueError, match=r"takes a step for 1 passes .* this call's have 2; enable"
    ):
        draw(pipe, negative_prompt="the sea", true_cfg_scale=2.0)
    with pytest.raises(ValueError, match="ranks that share an image would not decide as one"):
        check_caches(pipe, {}, (), SimpleNamespace(guidance_ranks=1))
    disable()
    enabled(pipe.transformer, enable_separate_cfg=True)
    guided = {"negative_prompt": "the sea", "true_cfg_scale": 2.0}
    draw(pipe, **guided)
    image = torch.rand(1, 3, 24, 40)
    with pytest.raises(ValueError, match="stages that take few steps have one; use preset="):
        draw(pipe, enlarge=image, preset="refine", height=48, width=80, **guided)
    pipe = CLEARPipeline(make_pipeline("qwen-image", QwenImagePipeline))
    disable = enabled(pipe)  # of the class
    try:
        with pytest.raises(ValueError, match=r"wrapped the call of QwenImagePipeline, .*enable_c"):
            pipe("a house", height=16, width=16, num_inference_steps=1)
    finally:
        disable()
