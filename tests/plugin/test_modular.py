"""CLEAR on diffusers' modular pipelines, whose parts are attributes as a stock pipeline's are."""

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.krea2 import encoders
from support.families.pipelines import draw, make_pipeline
from support.models import FAR
from support.slow import few

from clear_dit import apply_clear, remove_clear
from clear_dit.families.table import models_of, transformer_of

PIPELINES = {
    "flux": diffusers.FluxModularPipeline,
    "flux2": diffusers.Flux2ModularPipeline,
    "sd3": diffusers.StableDiffusion3ModularPipeline,
    "qwen-image": diffusers.QwenImageModularPipeline,
    "z-image": diffusers.ZImageModularPipeline,
    "krea2": diffusers.Krea2ModularPipeline,
    "flux3": diffusers.Flux3ModularPipeline,
    "qwen-image-2.1": diffusers.QwenImage21ModularPipeline,
    "ernie-image": diffusers.ErnieImageModularPipeline,
}


@pytest.fixture(params=few(PIPELINES, "flux", "flux3"))
def name(request):
    return request.param


@pytest.fixture
def pipe(name, monkeypatch):
    pipe = make_pipeline(name, PIPELINES[name])
    if name == "krea2":  # the published model's layers and template
        monkeypatch.setattr(encoders, "KREA2_TEXT_ENCODER_SELECT_LAYERS", (1, 2))
    elif name == "qwen-image-2.1":
        pipe.processor.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
    return pipe


def images(pipe, name):
    return draw(pipe, name, 4, 8)


# ERNIE-Image's gives its scheduler a tensor.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_on_and_off(pipe, name):
    stock = images(pipe, name)
    assert stock.isfinite().all()
    assert stock.std() > 1e-3
    assert transformer_of(pipe, "") is pipe.transformer
    assert models_of(pipe, "") == [pipe.transformer]
    apply_clear(pipe, radius=FAR)
    torch.testing.assert_close(images(pipe, name), stock, rtol=0, atol=2e-5)
    apply_clear(pipe, radius=2)
    assert (images(pipe, name) - stock).abs().max() > 1e-3
    assert remove_clear(pipe)
    assert torch.equal(images(pipe, name), stock)
    assert not remove_clear(pipe)
