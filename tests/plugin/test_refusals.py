"""Models without a layer for CLEAR are refused by name, and nothing is left on them."""

import pytest
import torch
from support.families.models import FAMILIES, make_model

from clear_dit import apply_clear
from clear_dit.families.table import family_of


class Quantised(torch.nn.Module):
    """A block as another library makes it."""


def refused(model, match):
    before = dict(vars(model))
    with pytest.raises(ValueError, match=match):
        apply_clear(model, radius=2)
    assert vars(model).keys() == before.keys()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_of_another_class(name):
    model = make_model(name)
    for stack in family_of(model).stacks:
        if hasattr(model, stack):
            setattr(model, stack, torch.nn.ModuleList([Quantised()]))
    refused(model, rf"must be diffusers' own, .*; got .*\.0, Quantised of {__name__}")


@pytest.mark.parametrize("name", FAMILIES)
def test_one_block_of_another_class(name):
    model = make_model(name)
    stack = family_of(model).stacks[-1]
    getattr(model, stack)[-1] = Quantised()
    refused(model, rf"must be diffusers' own, .*; got {stack}\.\d, Quantised of {__name__}")


def test_an_attention_layer_of_another_class():
    model = make_model("flux")
    model.single_transformer_blocks[1].attn = Quantised()
    refused(model, r"got single_transformer_blocks\.1, FluxSingleTransformerBlock of diffusers")


def test_no_blocks():
    refused(make_model("flux", num_layers=0, num_single_layers=0), "own, .*; got no blocks")


def test_model_of_another_class():
    model = type("FluxTransformer2DModel", (torch.nn.Module,), {"__module__": "other.models"})()
    refused(model, r"models are Flux.* of diffusers.*; got FluxTransformer2DModel of other.models")


def test_processor_of_another_class():
    model = make_model("flux")
    model.transformer_blocks[0].attn.processor = Quantised()
    refused(model, rf"blocks\.0\.attn has Quantised of {__name__}; in FLUX")
