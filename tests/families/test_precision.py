"""Which linear layers are quantised: all in the blocks, but what a family says otherwise."""

from fnmatch import fnmatchcase

import pytest
import torch
from support.families.models import FAMILIES, make_model
from support.slow import slow
from torch import nn

from clear_dit.bench.published import CONFIGURATIONS
from clear_dit.counting.fake import build, defaults
from clear_dit.families.precision import PIECE, linear_layers, linears_of
from clear_dit.families.table import family_of

# Of the lists of blocks, those that stay wide; and what modulates a block.
WIDE_BLOCKS = {
    "qwen-image": ("transformer_blocks.0.",),
    "z-image": ("noise_refiner.", "context_refiner."),
}
LISTS = ("transformer_blocks.", "single_transformer_blocks.", "layers.", "mode_blocks.")
LISTS += ("txt_mode_blocks.", "noise_refiner.", "context_refiner.")
MODULATION = (".norm1.linear", ".norm1_context.linear", ".norm.linear", "_mod.1")
MODULATION += (".adaLN_modulation.0",)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_narrow_and_all_else_is_wide(name):
    with torch.device("meta"):
        model = FAMILIES[name].model_class(**FAMILIES[name].config)
    found = linears_of(model)
    layers = dict(linear_layers(model))
    assert sorted([*found.narrow, *found.stored, *found.wide]) == sorted(layers)
    for layer, linear in layers.items():
        even = linear.in_features % PIECE == linear.out_features % PIECE == 0
        in_block = layer.startswith(LISTS) and not layer.startswith(WIDE_BLOCKS.get(name, "-"))
        modulates = in_block and even and layer.endswith(MODULATION)
        assert (layer in found.wide) == (not in_block or not even), layer
        assert (layer in found.stored) == modulates, layer


@slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_true_models(name):
    """Every pattern is that of a layer; what is quantised is most of the model, in bfloat16."""
    with defaults(torch.bfloat16, "meta"):
        model = build(CONFIGURATIONS[name].transformer)
    family, found = family_of(model), linears_of(model)
    names = [layer for layer, _ in linear_layers(model)]
    absent = [
        pattern
        for pattern in (*family.wide, *family.modulation)
        if not any(fnmatchcase(layer, pattern) for layer in names)
    ]
    assert absent == []
    quantised = [model.get_submodule(layer).weight for layer in (*found.narrow, *found.stored)]
    assert {weight.dtype for weight in quantised} == {torch.bfloat16}
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert sum(weight.numel() for weight in quantised) > 0.87 * whole
    assert all(reason[-1] != "." and len(reason) > 20 for reason in found.wide.values())


def test_a_loras_own_layers_are_no_part_of_it():
    from peft import LoraConfig

    model = make_model("flux")
    before = linears_of(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "norm1.linear"]))
    after = linears_of(model)
    plain = [name.replace(".base_layer", "") for name in after.narrow]
    assert plain == list(before.narrow)
    assert [name.replace(".base_layer", "") for name in after.stored] == list(before.stored)
    assert "transformer_blocks.0.attn.to_q.base_layer" in after.narrow
    assert isinstance(model.get_submodule(after.narrow[0]), nn.Linear)
