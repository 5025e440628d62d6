"""Krea 2: the gate after attention, padding in the middle of the prompt, position ids."""

import pytest
import torch
from support.families.models import make_inputs, make_model, run
from support.families.oracle import dense_attention

from clear_dit import apply_clear


def assert_same(value, other):
    torch.testing.assert_close(value, other, rtol=1e-4, atol=3e-6)


def local(given, far=False):
    model = make_model("krea2")
    apply_clear(model, radius=2, far=far)
    return run(model, given)


def test_the_gate_comes_after_attention():
    """Where it is shut, nobody sees anybody."""
    given, shut = make_inputs("krea2", 4, 6), make_model("krea2")
    for block in shut.transformer_blocks:
        block.attn.to_gate.register_forward_hook(lambda _, __, out: torch.full_like(out, -1e4))
    expected = run(shut, given)
    apply_clear(shut, radius=2, far=False)
    assert torch.equal(run(shut, given), expected)
    assert not torch.allclose(local(given), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "mask",
    [[[1, 1, 0, 0, 1]], [[1, 1, 0, 0, 1], [1, 0, 0, 0, 1]], [[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]],
)
@pytest.mark.parametrize("far", [False, True])
def test_padding_anywhere(mask, far):
    given = make_inputs("krea2", 4, 6, batch=len(mask))
    given["encoder_attention_mask"] = torch.tensor(mask).bool()
    with dense_attention("krea2", 4, 6, 2, far=far):
        expected = run(make_model("krea2"), given)
    assert_same(local(given, far), expected)


def test_the_layers_get_text_that_somebody_has():
    model, lengths = make_model("krea2"), []
    apply_clear(model, radius=2)
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    given = make_inputs("krea2", 4, 6, batch=2)
    for used, mask in ((3, [[1, 1, 0, 0, 0], [0, 1, 0, 0, 1]]), (2, [[0, 1, 0, 0, 1]] * 2)):
        run(model, given | {"encoder_attention_mask": torch.tensor(mask).bool()})
        assert lengths == [used + 24] * 2
        lengths.clear()


def test_position_ids_in_bfloat16():
    given = make_inputs("krea2", 2, 300)
    rounded = given | {"position_ids": given["position_ids"].bfloat16()}
    assert torch.equal(local(rounded), local(given))


def test_refused_arguments():
    given = make_inputs("krea2", 4, 6)
    with pytest.raises(ValueError, match=r"position_ids means 4 x 6 = 24 image tokens, but .* 22"):
        local(given | {"hidden_states": torch.randn(1, 22, 4)})
    shuffled = given | {"position_ids": given["position_ids"].flip(0)}
    with pytest.raises(ValueError, match="are not those of one image in raster order"):
        local(shuffled)
