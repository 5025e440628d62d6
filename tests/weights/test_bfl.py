"""diffusers' names in BFL's layout: both ways bit for bit, and at FLUX.1-dev's true shapes."""

import re

import pytest
import torch
from diffusers import FluxTransformer2DModel
from support.comfyui.flux import Flux
from support.families.models import make_model

from clear_dit.weights.bfl import Place, from_bfl, into_bfl, place_in_bfl

CHANNELS = 32


def mapped(state, channels):
    return {name: x for name, x in state.items() if place_in_bfl(name, channels)}


def random_state():
    torch.manual_seed(0)
    return {key: torch.randn_like(x) for key, x in Flux().state_dict().items()}


def test_diffusers_to_bfl_and_back_bit_for_bit():
    tensors = mapped(make_model("flux").state_dict(), CHANNELS)
    state = random_state()
    before = {key: x.clone() for key, x in state.items()}
    fused = into_bfl(tensors, state, CHANNELS)
    back = from_bfl(fused, tensors, CHANNELS)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], x) for name, x in tensors.items())
    assert all(torch.equal(state[key], x) for key, x in before.items())  # the base is left alone


def test_bfl_to_diffusers_and_back_bit_for_bit():
    names = list(mapped(make_model("flux").state_dict(), CHANNELS))
    state = random_state()
    apart = from_bfl(state, names, CHANNELS)
    touched = {place_in_bfl(name, CHANNELS).key for name in names}
    poison = {key: torch.full_like(state[key], float("nan")) for key in touched}
    fused = into_bfl(apart, poison, CHANNELS)
    assert fused.keys() == touched
    assert all(torch.equal(fused[key], state[key]) for key in touched)  # and nothing was left out


def test_what_is_left_out_is_the_base_s():
    name = "single_transformer_blocks.1.attn.to_k.weight"
    state = random_state()
    fused = into_bfl({name: torch.zeros(32, 32)}, state, CHANNELS)
    expected = state["single_blocks.1.linear1.weight"].clone()
    expected[32:64] = 0
    assert fused.keys() == {"single_blocks.1.linear1.weight"}
    assert torch.equal(fused["single_blocks.1.linear1.weight"], expected)


def test_at_the_true_shapes_of_flux_1_dev():
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    places = {}
    state = model.state_dict()
    for name, tensor in state.items():
        place = place_in_bfl(name, 3072)
        if place is not None:
            places.setdefault(place.key, []).append((place, tensor.shape))
    inside = re.compile(r"\.attn\.|single_transformer_blocks\.\d+\.proj_")
    assert sum(map(len, places.values())) == sum(bool(inside.search(name)) for name in state)
    shapes = {}
    for key, parts in places.items():
        parts.sort(key=lambda part: part[0].start)
        row = 0
        for place, shape in parts:  # one behind the other, without a gap
            assert place.start == row
            assert place.stop in (None, row + shape[0])
            row += shape[0]
        shapes[re.sub(r"\d+", "{}", key, count=1)] = (row, *parts[0][1][1:])
    assert {key: shape for key, shape in shapes.items() if "weight" in key} == {
        "double_blocks.{}.img_attn.qkv.weight": (9216, 3072),
        "double_blocks.{}.img_attn.proj.weight": (3072, 3072),
        "double_blocks.{}.txt_attn.qkv.weight": (9216, 3072),
        "double_blocks.{}.txt_attn.proj.weight": (3072, 3072),
        "single_blocks.{}.linear1.weight": (21504, 3072),
        "single_blocks.{}.linear2.weight": (3072, 15360),
    }
    assert shapes["single_blocks.{}.linear1.bias"] == (21504,)
    assert shapes["double_blocks.{}.img_attn.norm.query_norm.scale"] == (128,)
    assert len(places) == 19 * 12 + 38 * 6


def test_places():
    assert place_in_bfl("transformer_blocks.3.attn.to_v.bias", 64) == Place(
        "double_blocks.3.img_attn.qkv.bias", 128, 192
    )
    assert place_in_bfl("single_transformer_blocks.0.attn.norm_k.weight", 64) == Place(
        "single_blocks.0.norm.key_norm.scale"
    )
    for name in (
        "transformer_blocks.0.attn.processor.spatial_weight",
        "transformer_blocks.0.norm1.linear.weight",
        "x_embedder.weight",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
    ):
        assert place_in_bfl(name, 64) is None


def test_what_has_no_place_and_what_does_not_fit():
    state = random_state()
    with pytest.raises(ValueError, match=r"no place for 'x_embedder\.weight'"):
        into_bfl({"x_embedder.weight": torch.zeros(1)}, state, CHANNELS)
    with pytest.raises(ValueError, match="no place for"):
        from_bfl(state, ["transformer_blocks.7.attn.to_q.weight"], CHANNELS)
    name = "transformer_blocks.0.attn.to_q.weight"
    with pytest.raises(ValueError, match=r"has shape \(16, 32\), its place .* \(32, 32\)"):
        into_bfl({name: torch.zeros(16, 32)}, state, CHANNELS)
