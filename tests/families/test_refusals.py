"""What a family cannot do is refused by name, before anything is changed."""

import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from support.families.models import FAMILIES, make_inputs, make_model, run

from clear_dit import CLEARProcessor, apply_clear, load_clear_weights
from clear_dit.families.table import CONTROLNETS, MODELS, all_families, find_family


class FluxTransformer2DModelOfMine(torch.nn.Module):
    pass


class Wrapped(FluxTransformer2DModel):
    """As FSDP makes one."""


def test_the_table():
    families = all_families()
    assert [family.transformer for family in families] == [
        n for n in MODELS if n not in CONTROLNETS
    ]
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.processors
    flux = families[0]
    assert flux.title.startswith("FLUX.1")


def test_an_older_diffusers_has_fewer(monkeypatch):
    older = SimpleNamespace(FluxTransformer2DModel=None, SD3Transformer2DModel=None)
    monkeypatch.setitem(sys.modules, "diffusers", older)
    assert [family.name for family in all_families()] == ["flux1", "sd3"]


def test_classes():
    assert find_family(FluxTransformer2DModelOfMine()) is None
    assert find_family(Wrapped(**FAMILIES["flux"].config)).name == "flux1"
    with pytest.raises(ValueError, match=r"FluxTrans.*, Chroma.* got FluxTransformer2DModelOfMine"):
        apply_clear(FluxTransformer2DModelOfMine())


@pytest.mark.parametrize("name", ["chroma", "qwen-image"])
def test_unknown_processors(name):
    model = make_model(name)
    layer = model.transformer_blocks[1].attn
    layer.set_processor(AttnProcessor2_0())
    with pytest.raises(
        ValueError, match=r"blocks\.1\.attn has AttnProcessor2_0 of diffusers.*; in .* takes"
    ):
        apply_clear(model)
    assert not isinstance(model.transformer_blocks[0].attn.processor, CLEARProcessor)


def test_fused_projections():
    model = make_model("qwen-image")
    model.transformer_blocks[1].attn.fused_projections = True
    with pytest.raises(ValueError, match=r"blocks\.1\.attn has fused .*Qwen-Image .*unfuse_qkv"):
        apply_clear(model)
    flux = make_model("flux2")
    given = make_inputs("flux2", 4, 6)
    expected = run(flux, given)
    flux.fuse_qkv_projections()
    apply_clear(flux, radius=100)
    torch.testing.assert_close(run(flux, given), expected)
    with pytest.raises(ValueError, match="has fused projections; call unfuse_qkv_projections"):
        load_clear_weights(flux, __file__)


def test_quantised_projections(tmp_path):
    model = make_model("qwen-image")
    given = make_inputs("qwen-image", 4, 6)
    for block in model.transformer_blocks:
        block.attn.to_q = Halved(block.attn.to_q)
    expected = run(model, given)
    apply_clear(model, radius=100)  # the projection is called, whatever it is
    torch.testing.assert_close(run(model, given), expected)
    (tmp_path / "clear_local_100.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.to_q\.weight is quantised .*int8"):
        load_clear_weights(model, tmp_path)


class Halved(torch.nn.Module):
    """A linear layer of 8-bit weights."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        self.scale = float(scale)
        rounded = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(rounded, requires_grad=False)
        self.bias = linear.bias

    def forward(self, tokens):
        return torch.nn.functional.linear(tokens, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("name", ["chroma", "flux2"])
def test_latents_that_contradict_the_ids(name):
    model, given = make_model(name), make_inputs(name, 4, 6)
    apply_clear(model)
    del given["attention_mask" if name == "chroma" else "timestep"]
    given |= {"timestep": torch.tensor([0.5]), "hidden_states": torch.randn(1, 22, 4)}
    with pytest.raises(ValueError, match=r"4 x 6 = 24 image tokens, but hidden_states has 22"):
        run(model, given)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 5), r"must be \(batch, text \+ image\) = \(1, 29\), got \(1, 5\)"),
        (torch.arange(29)[None] < 20, "may hide text only, not image tokens"),
    ],
)
def test_masks_of_chroma(mask, message):
    model, given = make_model("chroma"), make_inputs("chroma", 4, 6)
    apply_clear(model)
    with pytest.raises(ValueError, match=message):
        run(model, given | {"attention_mask": mask})


def test_numbers_as_a_mask_hide_text_in_chroma():
    """Stock diffusers adds them to the scores, and every token is still seen."""
    model, given = make_model("chroma"), make_inputs("chroma", 4, 6, batch=2, padded=True)
    numbers = given | {"attention_mask": given["attention_mask"].float()}
    other = dict(numbers, encoder_hidden_states=given["encoder_hidden_states"].clone())
    other["encoder_hidden_states"][1, -1] += 1
    assert not torch.equal(run(model, numbers), run(model, other))
    apply_clear(model, radius=100)
    assert torch.equal(run(model, numbers), run(model, given))
    assert torch.equal(run(model, numbers), run(model, other))


def test_cached_reference_keys_of_flux2():
    model, given = make_model("flux2"), make_inputs("flux2", 4, 6, references=((2, 2),))
    apply_clear(model)
    with pytest.raises(ValueError, match=r"kv_cache_mode='extract', Flux2KleinKVPipeline\) is not"):
        run(model, given | {"kv_cache_mode": "extract", "num_ref_tokens": 4})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([[(1, 4, 6)], [(1, 6, 4)]], "all images of a batch must have one size"),
        ([[(2, 4, 3)]] * 2, "have one frame, got 2"),
        ([[(1, 5, 6)]] * 2, "5 x 6 = 30 image tokens, but hidden_states has 24"),
    ],
)
def test_shapes_of_qwen_image(shapes, message):
    model, given = make_model("qwen-image"), make_inputs("qwen-image", 4, 6, batch=2)
    apply_clear(model)
    with pytest.raises(ValueError, match=message):
        run(model, given | {"img_shapes": shapes})


@pytest.mark.parametrize(("columns", "text", "needed"), [(8194, 5, 4102), (8180, 7, 4097)])
def test_positions_of_qwen_image(columns, text, needed):
    """Stock diffusers fails there with shapes that do not fit, if at all."""
    model, given = make_model("qwen-image"), make_inputs("qwen-image", 1, columns, text)
    apply_clear(model)
    with pytest.raises(ValueError, match=rf"4096 positions, but 1 x {columns} .* need {needed}"):
        run(model, given)


def test_qwen_image_layered():
    model = make_model("qwen-image", use_layer3d_rope=True)
    apply_clear(model)
    with pytest.raises(ValueError, match="Qwen-Image-Layered is not supported"):
        run(model, make_inputs("qwen-image", 4, 6))


def test_a_bare_processor_is_for_flux1():
    model, given = make_model("flux2"), make_inputs("flux2", 4, 6)
    model.set_attn_processor(CLEARProcessor())
    with pytest.raises(ValueError, match=r"is for FLUX\.1's layers, got a layer of class Flux2"):
        run(model, given)
