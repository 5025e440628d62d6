"""The node "CLEAR attention" on FLUX in BFL's layout, against diffusers' result and dense masks."""

import threading

import pytest
import torch
from support.comfyui.from_diffusers import Inputs, pair
from support.oracle import mask_by_definition
from torch.testing import assert_close

from clear_dit import Window, apply_clear, remove_clear

SIZES = ((8, 8), (6, 11), (13, 5))
OVERRIDE = "optimized_attention_override"


@pytest.fixture
def apply(pack):
    return pack.node_attention.apply


def with_mask(patcher, window, layers=None):
    """The stock model with a dense mask over its attention, for the oracle."""
    clone, mask = patcher.clone(), mask_by_definition(window)

    def override(func, *args, **kwargs):
        options = kwargs["transformer_options"]
        if layers and (options["block_type"], options["block_index"]) in layers:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "mask": mask})

    clone.model_options["transformer_options"][OVERRIDE] = override
    return clone


@pytest.mark.parametrize("size", SIZES)
def test_model_in_bfl_layout_is_diffusers_model(size):
    transformer, patcher = pair()
    inputs = Inputs(*size, batch=2)
    assert_close(inputs.comfyui(patcher), inputs.of_diffusers(transformer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("far", ["off", "on"])
def test_radius_past_the_diagonal_is_comfyui_attention_bit_for_bit(apply, far):
    _, patcher = pair()
    inputs = Inputs(6, 9)
    clear = apply(patcher, radius=10, far=far)  # the diagonal is 9.4
    assert torch.equal(inputs.comfyui(clear), inputs.comfyui(patcher))
    smaller = apply(patcher, radius=9, far="off")
    assert not torch.equal(inputs.comfyui(smaller), inputs.comfyui(patcher))
    exact = Inputs(4, 5)  # the diagonal is 5, and a disc of 5 does not reach its end
    for radius, covered in ((5, False), (6, True)):
        found = exact.comfyui(apply(patcher, radius=radius, far="off"))
        assert torch.equal(found, exact.comfyui(patcher)) == covered


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_radius_2_is_a_dense_mask(apply, size, batch):
    _, patcher = pair()
    inputs = Inputs(*size, text=4, batch=batch)
    expected = inputs.comfyui(with_mask(patcher, Window(*size, 4, 2)))
    assert (expected - inputs.comfyui(patcher)).abs().max() > 1e-2
    found = inputs.comfyui(apply(patcher, radius=2, far="off"))
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("far", ["off", "on", "auto"])
@pytest.mark.parametrize("references", [(), ((4, 6), (3, 3))])
def test_node_gives_what_apply_clear_gives_on_diffusers_model(apply, far, references):
    transformer, patcher = pair()
    clear = apply(patcher, radius=3, far=far)
    apply_clear(transformer, radius=3, far={"off": False, "on": True, "auto": None}[far])
    for size in (*SIZES, SIZES[0]):  # sizes one after the other, and back
        inputs = Inputs(*size, batch=2, references=references)
        expected = inputs.of_diffusers(transformer)
        assert_close(inputs.comfyui(clear), expected, atol=1e-5, rtol=1e-5)


def test_far_and_local_differ(apply):
    _, patcher = pair()
    inputs = Inputs(12, 12)
    far, local = (inputs.comfyui(apply(patcher, radius=2, far=far)) for far in ("on", "off"))
    assert (far - local).abs().max() > 1e-3


def test_dense_until_is_a_share_of_the_schedule(apply):
    transformer, patcher = pair()
    clear = apply(patcher, radius=2, far="off", dense_until=0.25)
    stock = {}
    for level in (0.9, 0.75, 0.5):
        inputs = Inputs(8, 7, level=level)
        stock[level] = torch.equal(inputs.comfyui(clear), inputs.comfyui(patcher))
    # As start_percent of other nodes: at 0.25 itself, sigma 0.75, it has begun.
    assert stock == {0.9: True, 0.75: False, 0.5: False}
    apply_clear(transformer, radius=2, far=False, dense_until=0.76)
    for level in (0.9, 0.75):
        inputs = Inputs(8, 7, level=level)
        expected = inputs.of_diffusers(transformer)
        assert_close(inputs.comfyui(clear), expected, atol=1e-5, rtol=1e-5)
    everything = apply(patcher, radius=2, far="off", dense_until=1.0)
    assert torch.equal(inputs.comfyui(everything), inputs.comfyui(patcher))


def test_dense_layers_are_counted_double_blocks_first(apply):
    transformer, patcher = pair()
    inputs = Inputs(8, 7)
    names = ["transformer_blocks.1.attn", "single_transformer_blocks.0.attn"]
    apply_clear(transformer, radius=2, far=False, dense_layers=names)
    expected = inputs.of_diffusers(transformer)
    found = inputs.comfyui(apply(patcher, radius=2, far="off", dense_layers="1-2"))
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    remove_clear(transformer)
    every = inputs.comfyui(apply(patcher, radius=2, far="off", dense_layers="0, 1 - 3"))
    assert torch.equal(every, inputs.comfyui(patcher))


def test_latents_that_are_not_whole_tokens_are_padded_as_the_model_does(apply):
    _, patcher = pair()
    inputs = Inputs(8, 7)
    inputs.latent = inputs.latent[..., :15, :13]
    expected = inputs.comfyui(with_mask(patcher, Window(8, 7, 5, 2)))
    found = inputs.comfyui(apply(patcher, radius=2, far="off"))
    assert found.shape == inputs.latent.shape
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_clones_and_threads_do_not_disturb_one_another(apply):
    _, patcher = pair()
    stock = Inputs(8, 8).comfyui(patcher)
    patchers = [
        apply(patcher, radius=2, far="off").clone(),
        apply(patcher, radius=3, far="off"),
        apply(patcher.clone(), radius=2, far="on"),
        patcher.clone(),
    ]
    jobs = [(one, Inputs(*size, seed=i)) for i, size in enumerate(SIZES) for one in patchers]
    expected = [inputs.comfyui(one) for one, inputs in jobs]
    found = [[] for _ in jobs]

    def work(offset):
        for i in range(len(jobs)):
            number = (i * 5 + offset) % len(jobs)
            one, inputs = jobs[number]
            found[number].append(inputs.comfyui(one))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, one in zip(found, expected, strict=True):
        assert len(results) == 4
        assert all(torch.equal(result, one) for result in results)
    assert torch.equal(Inputs(8, 8).comfyui(patcher), stock)
    assert patcher.model_options == {"transformer_options": {}}


def test_forwards_within_forwards_keep_their_own_sizes(apply):
    """Another size runs on the same model between two blocks of a forward."""
    _, patcher = pair()
    clear = apply(patcher, radius=2, far="off")
    outer, inner = Inputs(8, 8), Inputs(5, 12)
    expected = outer.comfyui(clear), inner.comfyui(clear)
    nested = []

    def between(func, *args, **kwargs):
        if not nested:
            nested.append(None)
            nested[0] = inner.comfyui(clear)
        return clear.model_options["transformer_options"][OVERRIDE](func, *args, **kwargs)

    chained = clear.clone()
    chained.model_options["transformer_options"][OVERRIDE] = between
    assert torch.equal(outer.comfyui(chained), expected[0])
    assert torch.equal(nested[0], expected[1])


def test_padded_text_is_hidden(apply):
    _, patcher = pair()
    clear = apply(patcher, radius=2, far="off")
    inputs = Inputs(8, 7, text=6)
    shorter = Inputs(8, 7, text=6)
    shorter.diffusers["encoder_hidden_states"] = inputs.diffusers["encoder_hidden_states"][:, :4]
    mask = torch.ones(1, 1, 6 + 56, dtype=torch.bool)
    mask[..., 4:6] = False
    additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    for given in (mask, additive, additive[None].clamp(min=-65504.0)):
        found = inputs.comfyui(clear, attention_mask=given)
        assert_close(found, shorter.comfyui(clear), atol=1e-5, rtol=1e-5)
    nothing = torch.zeros(1, 1, 62)
    assert torch.equal(inputs.comfyui(clear, attention_mask=nothing), inputs.comfyui(clear))


@pytest.mark.parametrize(
    ("shape", "tokens", "value"),
    [
        ((1, 62, 62), slice(20, 30), -2.0),
        ((62, 62), slice(20, 30), -2.0),
        ((1, 1, 1, 62), slice(20, 30), float("-inf")),
        ((1, 1, 62), slice(2, 4), -2.0),  # weighs text
        ((1, 1, 62), slice(2, 4), 1.0),
    ],
)
def test_other_masks_keep_attention_full_and_say_so(apply, caplog, shape, tokens, value):
    _, patcher = pair()
    clear = apply(patcher, radius=2, far="off")
    inputs, mask = Inputs(8, 7, text=6), torch.zeros(shape)
    mask[..., tokens] = value
    expected = inputs.comfyui(patcher, attention_mask=mask)
    assert torch.equal(inputs.comfyui(clear, attention_mask=mask), expected)
    inputs.comfyui(clear, attention_mask=mask)
    assert caplog.text.count("keeps attention full") == 1


def test_attention_of_other_models_is_left_alone(apply):
    """A text encoder, or a ControlNet that got the options of the model outside of its forward."""
    from support.comfyui.attention import optimized_attention

    _, patcher = pair()
    options = apply(patcher, radius=1, far="off").model_options["transformer_options"]
    q, k, v = torch.randn(3, 1, 2, 30, 16).unbind()
    expected = optimized_attention(q, k, v, 2, skip_reshape=True)
    found = optimized_attention(q, k, v, 2, skip_reshape=True, transformer_options=options)
    assert torch.equal(found, expected)


def test_an_override_before_gets_what_stays_full(apply, caplog):
    _, patcher = pair()
    seen = []

    def before(func, *args, **kwargs):
        options = kwargs["transformer_options"]
        seen.append((options["block_type"], options["block_index"]))
        return func(*args, **kwargs)

    patcher.model_options["transformer_options"][OVERRIDE] = before
    clear = apply(patcher, radius=2, far="off", dense_layers="0")
    assert "another node chose the model's attention" in caplog.text
    inputs = Inputs(8, 7)
    window = Window(8, 7, 5, 2)
    plain = patcher.clone()
    del plain.model_options["transformer_options"][OVERRIDE]
    expected = inputs.comfyui(with_mask(plain, window, layers=[("double", 0)]))
    assert_close(inputs.comfyui(clear), expected, atol=1e-5, rtol=1e-5)
    assert seen == [("double", 0)]


def test_half_precision_keeps_its_dtype(apply):
    _, patcher = pair()
    clear = apply(patcher, radius=2, far="on")
    inputs = Inputs(8, 7)
    exact = inputs.comfyui(clear)
    override = clear.model_options["transformer_options"][OVERRIDE]
    dtypes = []

    def half(func, q, k, v, *args, **kwargs):
        out = override(func, q.bfloat16(), k.bfloat16(), v.bfloat16(), *args, **kwargs)
        dtypes.append(out.dtype)
        return out.float()

    clear.model_options["transformer_options"][OVERRIDE] = half
    assert_close(inputs.comfyui(clear), exact, atol=0.05, rtol=0.05)
    assert set(dtypes) == {torch.bfloat16}
