"""What the ComfyUI nodes refuse, and in which words; and attention in ComfyUI's other forms."""

from types import SimpleNamespace

import pytest
import torch
from support.comfyui.from_diffusers import Inputs, pair
from support.comfyui.patcher import Model, ModelPatcher
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from clear_dit import Window

OVERRIDE = "optimized_attention_override"


@pytest.fixture
def apply(pack):
    return pack.node_attention.apply


class UNetModel(nn.Module):
    """Stable Diffusion's, for ComfyUI."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_layers": "1-"}, r"numbers and ranges such as '0-2, 56', got '1-'"),
        ({"dense_layers": "0, 4"}, r"names '4', but this FLUX.1 and FLUX.2 has the layers 0 to 3"),
        ({"dense_layers": "3-1"}, "names '3-1'"),
        ({"far": "maybe"}, "far must be one of auto, on, off"),
        ({"dense_until": 1.5}, "dense_until 0 to 1"),
        ({"radius": 0}, "radius 1 or more"),
        ({"radius": 1, "far": "on"}, "far keys need a radius of at least 2"),
    ],
)
def test_settings_out_of_range(apply, settings, message):
    _, patcher = pair()
    with pytest.raises(ValueError, match=f"^CLEAR attention: .*{message}"):
        apply(patcher, **settings)


def test_a_model_that_the_node_does_not_know(pack):
    patcher = ModelPatcher(Model(UNetModel()))
    with pytest.raises(ValueError, match=r"does not know this model \(UNetModel\); it knows FLUX"):
        pack.node_attention.apply(patcher)
    assert patcher.model_options == {"transformer_options": {}}


def test_twice_on_one_model(apply):
    _, patcher = pair()
    with pytest.raises(ValueError, match="this model has it already"):
        apply(apply(patcher).clone())


def test_an_override_after_the_node(apply):
    _, patcher = pair()
    node = apply(patcher, radius=2)
    Inputs(6, 6).comfyui(node)  # a workflow without the other node ran before
    clear = node.clone()
    clear.model_options["transformer_options"][OVERRIDE] = lambda func, *a, **k: func(*a, **k)
    with pytest.raises(ValueError, match="did not come to this node: another node replaces it"):
        Inputs(6, 6).comfyui(clear)


def test_a_step_cache_may_skip_all_blocks_of_later_steps(apply):
    _, patcher = pair()
    clear = apply(patcher, radius=2)
    inputs = Inputs(6, 6, level=0.5)
    kept = inputs.comfyui(clear)
    clear.add_wrapper_with_key("diffusion_model", "cache", lambda executor, *a, **k: kept)
    assert inputs.comfyui(clear, schedule=[0.9, 0.5, 0.0]) is kept
    with pytest.raises(ValueError, match="did not come to this node"):
        inputs.comfyui(clear, schedule=[0.5, 0.0])


def test_an_older_comfyui_whose_patches_get_no_options(apply):
    _, patcher = pair()
    clear = apply(patcher, radius=2)
    patches = clear.model_options["transformer_options"]["patches"]
    (own,) = patches["post_input"]
    patches["post_input"] = [
        lambda given: own({k: v for k, v in given.items() if k != "transformer_options"}) | given
    ]
    with pytest.raises(ValueError, match="does not tell where the image is"):
        Inputs(6, 6).comfyui(clear)


def test_an_older_comfyui_that_does_not_number_its_layers(apply):
    _, patcher = pair()
    clear = apply(patcher, radius=2)
    options = clear.model_options["transformer_options"]
    own = options[OVERRIDE]

    def without_number(func, *args, **kwargs):
        given = kwargs["transformer_options"]
        given = {key: value for key, value in given.items() if key != "block_index"}
        return own(func, *args, **kwargs | {"transformer_options": given})

    options[OVERRIDE] = without_number
    with pytest.raises(ValueError, match=r"did not come to this node: .* this ComfyUI is too old"):
        Inputs(6, 6).comfyui(clear)


def _longer(given):
    more = {"img": given["img"][:, :4], "img_ids": given["img_ids"][:, :4]}
    return dict(given) | {name: torch.cat([given[name], x], dim=1) for name, x in more.items()}


def _diagonal(given):
    ids = given["img_ids"].clone()
    ids[:, 18:, 1:] += 9  # a second image of the same group, below and to the right
    return dict(given) | {"img_ids": ids}


@pytest.mark.parametrize(
    ("patch", "after", "message"),
    [
        (_longer, True, "announced 5 text and 6 x 6 image tokens: another node changes"),
        (_diagonal, False, r"^CLEAR attention: .* not those of one image, .* offset or index"),
        (lambda given: dict(given) | {"img_ids": None}, False, "no position ids"),
    ],
)
def test_a_geometry_that_cannot_be_known(apply, patch, after, message):
    _, patcher = pair()
    if not after:
        patcher.set_model_patch(patch, "post_input")
    clear = apply(patcher, radius=2)
    if after:
        clear.set_model_patch(patch, "post_input")
    with pytest.raises(ValueError, match=message):
        Inputs(6, 6).comfyui(clear)


def test_noise_levels_that_cannot_be_told(apply):
    _, patcher = pair()
    clear = apply(patcher, radius=2, dense_until=0.5)
    inputs = Inputs(6, 6, batch=2)
    given = inputs.diffusers
    args = (
        inputs.latent, given["timestep"], given["encoder_hidden_states"],
        given["pooled_projections"], given["guidance"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="on both sides of dense_until"):
        clear.apply(*args, sigma=[0.9, 0.1])
    options = clear.model_options["transformer_options"] | {"wrappers": clear.wrappers}
    with pytest.raises(ValueError, match="has no sigmas"):
        clear.model.diffusion_model(*args, transformer_options=options)


# ---- the override itself, in every form in which ComfyUI's models call attention


def _call(pack, **settings):
    """An override, and options in which a FLUX forward of 5 text and 6 x 7 tokens is under way."""
    attention = pack.attention.Attention(pack.attention.Settings(**settings))
    forward = pack.forward.Forward(
        SimpleNamespace(double_blocks=[0], single_blocks=[0]), pack.forward.Layout(5, 6, 7)
    )
    options = {pack.forward.KEY: forward, "block_type": "double", "block_index": 0}
    return attention.override, options


def _never(*args, **kwargs):
    raise AssertionError("full attention ran")


def _expected(q, k, v, scale=None):
    mask = Window(6, 7, 5, 2).mask()
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
def test_every_form_of_tensors(pack, skip_reshape, skip_output_reshape, key_heads):
    override, options = _call(pack, radius=2, far=False)
    q, k, v = (torch.randn(2, heads, 47, 16) for heads in (4, key_heads, key_heads))
    given = [q, k, v] if skip_reshape else [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    out = override(
        _never, *given, 4, None, transformer_options=options, skip_reshape=skip_reshape,
        skip_output_reshape=skip_output_reshape, enable_gqa=key_heads < 4, scale=0.3,
        _inside_attn_wrapper=True,
    )  # fmt: skip
    expected = _expected(q, k, v, scale=0.3)
    if not skip_output_reshape:
        expected = expected.transpose(1, 2).flatten(2)
    assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_attention_over_other_keys_stays_full(pack, caplog):
    """Of an adapter's tokens, or with keys of a cache."""
    override, options = _call(pack, radius=2)
    q, k = torch.randn(1, 2, 47, 16), torch.randn(1, 2, 50, 16)
    call = {"skip_reshape": True, "transformer_options": options}
    assert override(lambda *args, **kwargs: "full", q, k, k, 2, **call) == "full"
    assert "over other keys than the sequence's own stays full" in caplog.text
    with pytest.raises(
        ValueError, match="50 tokens came, but the model announced 5 text and 6 x 7"
    ):
        override(_never, k, k, k, 2, **call)


def test_an_argument_it_does_not_know_keeps_attention_full(pack, caplog):
    override, options = _call(pack, radius=2)
    q = torch.randn(1, 2, 47, 16)
    out = override(
        lambda *args, **kwargs: "full", q, q, q, 2, skip_reshape=True, is_causal=True,
        transformer_options=options,
    )  # fmt: skip
    assert out == "full"
    assert "attention with is_causal stays full" in caplog.text
