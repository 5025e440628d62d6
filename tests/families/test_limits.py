"""SD3, Z-Image, HunyuanImage and CogView4: what each cannot do, and the text of each."""

import pytest
import torch
from support.families.models import make_inputs, make_model, run
from support.families.oracle import expected

from clear_dit import apply_clear


def assert_same(value, other):
    torch.testing.assert_close(value, other, rtol=1e-4, atol=3e-6)


def local(name, given, **config):
    """The prediction with CLEAR."""
    model = make_model(name, **config)
    apply_clear(model, radius=2, far=False)
    return run(model, given)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("sd3", {"pos_embed_max_size": 5}, "SD3 model has positions for 5 x 5 tokens, got 4 x 6"),
        ("z-image", {"axes_lens": [256, 4, 5]}, "has positions for 4 x 5 tokens, got 4 x 6"),
        ("z-image", {"axes_lens": [97, 16, 16]}, "for 95 tokens of text, got 96 with padding"),
        ("cogview4", {"rope_axes_dim": (4, 5)}, "has 4 x 5 positions, .* among 4 x 6 tokens"),
    ],
)
def test_sizes_past_the_positions(name, config, message):
    with pytest.raises(ValueError, match=message):
        local(name, make_inputs(name, 4, 6), **config)


def test_the_largest_sizes():
    for name, config in (
        ("sd3", {"pos_embed_max_size": 6}),
        ("z-image", {"axes_lens": [98, 4, 6]}),
        ("cogview4", {"rope_axes_dim": (4, 6)}),
    ):
        given = make_inputs(name, 4, 6)
        assert_same(local(name, given, **config), expected(name, 4, 6, 2, config=config))


def test_sd3_of_either_kind():
    model = make_model("sd3")
    (applied,) = apply_clear(model)
    assert [n for n in applied.layers if n.endswith("attn2")] == [
        "transformer_blocks.0.attn2",
        "transformer_blocks.1.attn2",
    ]
    config = {"qk_norm": None, "dual_attention_layers": ()}  # SD3, not 3.5
    given = make_inputs("sd3", 4, 6)
    assert_same(local("sd3", given, **config), expected("sd3", 4, 6, 2, config=config))


def test_z_images_of_two_kinds():
    given = make_inputs("z-image", 4, 6, batch=2)
    given["x"][1] = given["x"][1][..., :10]
    with pytest.raises(ValueError, match=r"one size, got latents of \[\(1, 8, 10\), \(1, 8, 12\)"):
        local("z-image", given)
    omni = make_inputs("z-image", 4, 6)
    omni["x"] = [omni["x"]]
    with pytest.raises(ValueError, match="Z-Image-Omni is not supported"):
        local("z-image", omni)


def test_hunyuan_image_without_the_second_encoders_text():
    """Empty or absent is the same to the stock model, and padding of the first one is cut off."""
    empty = make_inputs("hunyuan-image", 4, 6)
    empty["encoder_attention_mask_2"] = torch.zeros_like(empty["encoder_attention_mask_2"])
    absent = empty | {"encoder_hidden_states_2": None, "encoder_attention_mask_2": None}
    longer = dict(absent)
    longer["encoder_hidden_states"] = torch.cat(
        [absent["encoder_hidden_states"], torch.randn(1, 7, 8)], dim=1
    )
    longer["encoder_attention_mask"] = torch.tensor([[1] * 5 + [0] * 7])
    alone = local("hunyuan-image", absent)
    assert_same(local("hunyuan-image", empty), alone)
    assert_same(local("hunyuan-image", longer), alone)


def test_cogview4_hides_padded_text():
    given = make_inputs("cogview4", 4, 6, batch=2)
    given["attention_mask"] = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    out = local("cogview4", given)
    for row, start in ((0, 0), (1, 2)):
        alone = {k: v[row : row + 1] for k, v in given.items() if k != "attention_mask"}
        alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, start:]
        assert_same(out[row : row + 1], local("cogview4", alone))
