"""ControlNets: their own blocks get local attention with the transformer's, and give it back."""

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    FluxPipeline,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from PIL import Image
from support.families.models import FAMILIES
from support.models import (
    FAR,
    assert_differs,
    assert_same,
    by_definition,
    dense_masks,
    draw,
    image_mask,
)

from clear_dit import CLEARProcessor, apply_clear, load_clear_weights, remove_clear
from clear_dit.families.table import attention_layers

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")


def control_net(seed=0, num_mode=None):
    torch.manual_seed(seed)
    one_block = {"num_layers": 1, "num_single_layers": 1}
    model = FluxControlNetModel(**FAMILIES["flux"].config | one_block, num_mode=num_mode)
    for name, parameter in model.named_parameters():
        if name.startswith("controlnet_") and "mode" not in name:  # zero in a new one
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def control(model, inputs):
    return model(**inputs, return_dict=False)[1][0]


NETS = {"plain": {}, "union": {"num_mode": 3}}
ROUTES = {"bare": lambda m, **settings: m.set_attn_processor(CLEARProcessor(**settings))}
ROUTES["apply_clear"] = apply_clear


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("far", [False, True])
def test_alone(tiny_inputs, kind, route, far):
    model, inputs = control_net(**NETS[kind]), tiny_inputs(4, 6)
    inputs["controlnet_cond"] = torch.randn(1, 24, 4)
    text = 3
    if kind == "union":
        inputs["controlnet_mode"] = torch.tensor([[1]])
        text += 1  # the mode is a token of its own
    full = control(model, inputs)
    with by_definition(4, 6, 2, far, text):
        expected = control(model, inputs)
    assert_differs(expected, full)
    route(model, radius=FAR, far=far)
    assert_same(control(model, inputs), full)
    route(model, radius=2, far=far)
    assert_same(control(model, inputs), expected)
    assert remove_clear(model)
    assert torch.equal(control(model, inputs), full)


@pytest.fixture
def control_pipeline(tiny_pipeline):
    """A pipeline with given ControlNets, and a function that draws with it."""

    def make(nets):
        pipe = FluxControlNetPipeline.from_pipe(tiny_pipeline(FluxPipeline), controlnet=nets)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def controlled(pipe):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    multi = isinstance(pipe.controlnet, FluxMultiControlNetModel)
    return draw(
        pipe,
        control_image=[Image.fromarray(pixels)] * 2 if multi else Image.fromarray(pixels),
        control_mode=[0, 2] if multi else 0,
        controlnet_conditioning_scale=[1.0, 0.5] if multi else 1.0,
    )


@pytest.mark.parametrize("kind", ["one", "two", "union for two"])
def test_pipelines(control_pipeline, kind):
    if kind == "one":
        nets, texts = control_net(), (6,)
    elif kind == "two":
        nets, texts = FluxMultiControlNetModel([control_net(0), control_net(1)]), (6,)
    else:
        nets, texts = FluxMultiControlNetModel([control_net(num_mode=3)]), (6, 7)
    pipe = control_pipeline(nets)
    full = controlled(pipe)
    with dense_masks(*(image_mask(6, 10, 2, text) for text in texts)):
        expected = controlled(pipe)
    assert np.abs(expected - full).max() > 1e-3
    apply_clear(pipe, radius=2, far=False)
    np.testing.assert_allclose(controlled(pipe), expected, atol=1e-5)
    apply_clear(pipe, radius=FAR)
    np.testing.assert_allclose(controlled(pipe), full, atol=1e-5)
    assert remove_clear(pipe)
    for model in (pipe.transformer, *getattr(nets, "nets", [nets])):
        kinds = {type(attn.processor) for attn in attention_layers(model).values()}
        assert kinds == {FluxAttnProcessor}
    assert np.array_equal(controlled(pipe), full)


def test_weights_are_the_transformer_s(control_pipeline, clear_weights):
    net = control_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pipe = control_pipeline(net)
    apply_clear(pipe, radius=2, weights=clear_weights)
    after = net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {p.radius for p in net.attn_processors.values()} == {2}
    # Weights made for local attention are the transformer's; the ControlNet has none.
    of_transformer, of_net = pipe.transformer.attn_processors, net.attn_processors
    assert not any(p.has_far_keys for p in of_transformer.values())
    assert all(p.has_far_keys for p in of_net.values())
    for call in (load_clear_weights, lambda *args: apply_clear(args[0], weights=args[1])):
        with pytest.raises(ValueError, match=r"are FluxTransformer2DModel, Chroma.* got FluxC"):
            call(net, clear_weights)


def test_a_refusal_changes_neither(control_pipeline, tmp_path):
    pipe = control_pipeline(control_net())
    with pytest.raises(FileNotFoundError):
        apply_clear(pipe, weights=tmp_path / "none.safetensors")
    pipe.controlnet = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"FluxControlNetModel, .* alone or in a pipel.* Linear"):
        apply_clear(pipe)
    assert {type(p) for p in pipe.transformer.attn_processors.values()} == {FluxAttnProcessor}
