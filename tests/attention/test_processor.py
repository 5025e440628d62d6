"""CLEARProcessor against the stock processor: same results where it must, the window elsewhere."""

import logging
from unittest import mock

import pytest
import torch
from diffusers.models.transformers import transformer_flux
from support.models import FAR, assert_differs, assert_same, by_definition, run
from support.oracle import attention_by_definition

from clear_dit import CLEARProcessor, Window, apply_clear
from clear_dit.kernels.cells import FAR_LEVELS
from clear_dit.weights.learned import make_far_trainable

SHAPES = [(4, 4), (3, 7), (6, 2), (1, 9), (9, 1), (1, 1)]


with_and_without_far = pytest.mark.parametrize("far", [False, True])


def bare(model, **settings):
    model.set_attn_processor(CLEARProcessor(**settings))


ROUTES = {"bare": bare, "apply_clear": apply_clear}


@pytest.fixture(params=list(ROUTES))
def route(request):
    return ROUTES[request.param]


@pytest.mark.parametrize("shape", SHAPES)
@with_and_without_far
def test_radius_past_the_diagonal_is_the_stock_model(
    tiny_transformer, tiny_inputs, route, shape, far
):
    model, inputs = tiny_transformer(), tiny_inputs(*shape, batch=2)
    expected = run(model, inputs)
    route(model, radius=FAR, far=far)
    assert_same(run(model, inputs), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
@with_and_without_far
def test_small_radius_is_the_stock_model_by_the_definition(
    tiny_transformer, tiny_inputs, route, shape, impl, far
):
    model, inputs = tiny_transformer(), tiny_inputs(*shape, batch=2)
    with by_definition(*shape, 2, far):
        expected = run(model, inputs)
    route(model, radius=2, impl=impl, far=far)
    assert_same(run(model, inputs), expected)


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
def test_far_keys_of_several_levels(tiny_transformer, tiny_inputs, impl):
    model, inputs = tiny_transformer(), tiny_inputs(11, 19)
    with by_definition(11, 19, 2, far=True):
        expected = run(model, inputs)
    for radius in (2, 3):
        apply_clear(model, radius=radius, impl=impl)
        assert torch.allclose(run(model, inputs), expected, atol=1e-5) == (radius == 2)


@with_and_without_far
def test_resolution_text_and_batch_change_between_calls(tiny_transformer, tiny_inputs, route, far):
    stock, model = tiny_transformer(), tiny_transformer()
    route(model, radius=2, far=far)
    # Classifier-free guidance: two text lengths in turn; 4 x 6 and 6 x 4 have the same length.
    calls = [(4, 6, 3, 1), (4, 6, 5, 1), (4, 6, 3, 1), (6, 4, 3, 2), (4, 6, 3, 1), (5, 5, 0, 1)]
    for rows, columns, text, batch in calls:
        inputs = tiny_inputs(rows, columns, text, batch=batch)
        with by_definition(rows, columns, 2, far, text):
            expected = run(stock, inputs)
        assert_same(run(model, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ids_in_the_model_s_dtype_above_256(tiny_transformer, tiny_inputs, route, dtype):
    model = tiny_transformer(num_layers=1, num_single_layers=1)
    exact = tiny_inputs(2, 300)
    rounded = exact | {"img_ids": exact["img_ids"].to(dtype)}
    mask = Window(2, 300, 3, 4).mask()
    # The bare processor finds the grid in rounded ids; only apply_clear can put the ids right.
    seen = exact if route is apply_clear else rounded
    expected = run(model, seen, joint_attention_kwargs={"attention_mask": mask})
    route(model, radius=4, far=False)
    assert_same(run(model, rounded), expected)


def test_guidance_embedding_and_fused_projections(tiny_transformer, tiny_inputs, route):
    model = tiny_transformer(guidance_embeds=True)
    inputs = {**tiny_inputs(4, 5), "guidance": torch.tensor([3.5])}
    expected = run(model, inputs)
    route(model, radius=FAR)
    model.fuse_qkv_projections()
    assert_same(run(model, inputs), expected)


def test_bfloat16_model_is_as_close_as_the_stock_one(tiny_transformer, tiny_inputs):
    inputs = tiny_inputs(4, 6)
    exact = run(tiny_transformer(), inputs)
    model = tiny_transformer().to(torch.bfloat16)
    inputs = {
        name: value.bfloat16() if "ids" not in name else value for name, value in inputs.items()
    }
    allowed = 2 * (run(model, inputs).float() - exact).norm()
    apply_clear(model, radius=FAR)
    assert (run(model, inputs).float() - exact).norm() < allowed


def pooled_attention(window, weights):
    """Stands for diffusers' attention: dense, cell by cell, with the next layer's weights."""
    layer_weights = iter(weights)

    def attention(query, key, value, **_):
        weight = next(layer_weights).reshape(window.down_factor, window.down_factor)
        pooled = []
        for tokens in (key, value):
            image = tokens[:, window.text_length :].unflatten(1, (window.height, window.width))
            for y in range(0, window.height, window.down_factor):
                for x in range(0, window.width, window.down_factor):
                    cell = image[:, y : y + window.down_factor, x : x + window.down_factor]
                    part = weight[: cell.shape[1], : cell.shape[2]]
                    share = weight.numel() / part.numel()
                    pooled.append((cell * part[..., None, None]).sum(dim=(1, 2)) * share)
        keys, values = torch.stack(pooled, dim=1).chunk(2, dim=1)
        key, value = torch.cat([key, keys], dim=1), torch.cat([value, values], dim=1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~window.mask(), float("-inf"))
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)

    return attention


@pytest.mark.parametrize("shape", [(4, 6), (5, 7)])
def test_pooled_variant_with_weights_per_layer(tiny_transformer, tiny_inputs, monkeypatch, shape):
    stock, model, inputs = tiny_transformer(), tiny_transformer(), tiny_inputs(*shape, batch=2)
    apply_clear(model, radius=2, down_factor=2)
    weights = [p.spatial_weight for p in model.attn_processors.values()]
    assert len({id(weight) for weight in weights}) == 4
    assert all(weight.shape == (1, 1, 1, 2, 1, 2, 1) for weight in weights)
    assert all((weight == 0.25).all() for weight in weights)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(torch.randn(weight.shape))
    attention = pooled_attention(Window(*shape, 3, 2, 2), weights)
    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", attention)
    assert_same(run(model, inputs), run(stock, inputs))


def test_proportional_scale(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    plain = run(model, inputs)
    apply_clear(model, radius=FAR, proportional_base=27)  # the sequence's own length
    assert_same(run(model, inputs), plain)
    processor = CLEARProcessor(proportional_base=4608)
    assert processor._scale(4608, 64) == pytest.approx(0.125)
    assert processor._scale(4608**2, 64) == pytest.approx(2**0.5 * 0.125)


def test_explicit_grid_wins_and_is_checked(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    mask = Window(6, 4, 3, 2).mask()
    expected = run(model, inputs, joint_attention_kwargs={"attention_mask": mask})
    bare(model, radius=2, grid=(6, 4), far=False)
    assert_same(run(model, inputs), expected)
    bare(model, grid=(5, 5))
    with pytest.raises(ValueError, match=r"grid=\(5, 5\) means 25 image tokens.*27 tokens, 3 of"):
        run(model, inputs)


def test_one_look_per_forward_and_one_window_per_layout(tiny_transformer, tiny_inputs, monkeypatch):
    from clear_dit.attention import tracker as module

    looks = []
    original = module.layout_from_rotary
    monkeypatch.setattr(
        module, "layout_from_rotary", lambda *args: looks.append(1) or original(*args)
    )
    model = tiny_transformer()
    processor = CLEARProcessor(radius=2)
    model.set_attn_processor(processor)
    for _ in range(3):
        run(model, tiny_inputs(4, 6))
        run(model, tiny_inputs(6, 4))
    assert len(looks) == 6
    assert len(processor.tracker._windows) == 2
    assert len(processor.tracker._by_rotary) == 0  # nothing is kept alive


def test_made_again_from_its_class():
    assert CLEARProcessor(radius=3).__class__().settings == CLEARProcessor().settings
    assert "radius=3, down_factor=1" in repr(CLEARProcessor(radius=3))
    assert not list(CLEARProcessor().state_dict())
    assert list(CLEARProcessor(down_factor=4).state_dict()) == ["spatial_weight"]


def test_far_keys_by_default(tiny_transformer, tiny_inputs, caplog):
    """Where they are possible, and said once."""
    caplog.set_level(logging.INFO, logger="clear_dit")
    for settings, far in (
        ({}, True),
        ({"far": True}, True),
        ({"far": False}, False),
        ({"radius": 1}, False),
        ({"down_factor": 2}, False),
    ):
        processor = CLEARProcessor(**{"radius": 2} | settings)
        assert processor.has_far_keys == far
        assert f"far={far}" in repr(processor)
        model = tiny_transformer()
        model.set_attn_processor(processor)
        for _ in range(2):
            run(model, tiny_inputs(4, 6))
        said = caplog.text.count("far keys are on because this model has no CLEAR weights")
        assert said == (settings == {})
        caplog.clear()


def test_pooled_keys_that_count(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(5, 7)
    window, attended = Window(5, 7, 3, 2, 2, pooled_weight="count"), []

    def attend(query, key, value, **_):
        attended.append(attention_by_definition(query, key, value, window, 16**-0.5))
        return attended[-1]

    with mock.patch.object(transformer_flux, "dispatch_attention_fn", attend):
        expected = run(model, inputs)
    assert len(attended) == 4
    apply_clear(model, radius=2, down_factor=2, pooled_weight="count")
    assert_same(run(model, inputs), expected)
    apply_clear(model, radius=2, down_factor=2)
    assert_differs(run(model, inputs), expected)


def test_what_is_learned_of_far_keys(tiny_transformer, tiny_inputs):
    """A layer's own weights and offsets, by the definition, and their gradients."""
    model, inputs = tiny_transformer(num_layers=1, num_single_layers=0), tiny_inputs(5, 7)
    apply_clear(model, radius=2)
    plain = run(model, inputs)
    make_far_trainable(model)
    assert torch.equal(run(model, inputs), plain)
    processor = model.transformer_blocks[0].attn.processor
    weight, offset = processor.far_weight, processor.far_offset
    assert weight.shape == (FAR_LEVELS, 2, 2)
    assert offset.shape == (FAR_LEVELS, 2)
    with torch.no_grad():
        weight.uniform_(0, 0.5)
        offset.normal_()
    leaves = [x.detach().clone().requires_grad_() for x in (weight, offset)]
    window = Window(5, 7, 3, 2, far_levels=FAR_LEVELS)

    def attend(query, key, value, **_):
        return attention_by_definition(query, key, value, window, 16**-0.5, *leaves)

    with mock.patch.object(transformer_flux, "dispatch_attention_fn", attend):
        stock = tiny_transformer(num_layers=1, num_single_layers=0)
        expected = stock(**inputs).sample
        expected.square().sum().backward()
    out = model(**inputs).sample
    assert_same(out, expected)
    assert_differs(out, plain)
    out.square().sum().backward()
    for ours, theirs in zip((weight, offset), leaves, strict=True):
        assert theirs.grad[:2].abs().min() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 0}, "CLEARProcessor: radius must be an integer of at least 1, got 0"),
        ({"radius": -4}, "radius must be an integer of at least 1, got -4"),
        ({"radius": 2.5}, "radius must be an integer of at least 1, got 2.5"),
        ({"down_factor": 0}, "down_factor must be an integer of at least 1, got 0"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, flex, tiled, reference; got 'cuda'"),
        ({"grid": (4,)}, r"grid must be \(rows, columns\) in tokens, got \(4,\)"),
        ({"grid": (4, 0)}, "grid columns must be an integer of at least 1, got 0"),
        ({"proportional_base": 1}, "proportional_base must be an integer of at least 2, got 1"),
        ({"far": 3}, "far must be True, False or None, got 3"),
        ({"far": True, "down_factor": 4}, "exclude each other, got far=True and down_factor=4; le"),
        ({"far": True, "radius": 1}, "need a radius of at least 2, got radius=1; take a larger"),
        ({"pooled_weight": "two", "down_factor": 2}, "must be one or count, got 'two'"),
        ({"pooled_weight": "count"}, "'count' is for the pooled keys of down_factor > 1, got down"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CLEARProcessor(**settings)


def test_triton_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="impl='triton' cannot run on this machine: it needs a CU"):
        CLEARProcessor(impl="triton")


def test_down_factor_larger_than_the_grid(tiny_transformer, tiny_inputs, route):
    model = tiny_transformer()
    route(model, down_factor=4)
    with pytest.raises(ValueError, match=r"down_factor must not exceed the token grid \(3 x 5\)"):
        run(model, tiny_inputs(3, 5))


def test_bad_calls(tiny_transformer, tiny_inputs):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    bare(model)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        run(model, inputs, joint_attention_kwargs={"attention_mask": torch.ones(27, 27)})
    attn, states = model.single_transformer_blocks[0].attn, torch.randn(1, 27, 32)
    with pytest.raises(ValueError, match="without image_rotary_emb the token grid cannot be found"):
        attn(states)
    rotary = model.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))
    with pytest.raises(ValueError, match=r"3 text tokens and 4 x 6 image tokens.* has 26 tokens"):
        attn(states[:, 1:], image_rotary_emb=rotary)
    processor = attn.processor
    processor._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism is not supported"):
        run(model, inputs)
    processor._parallel_config = None
    processor._attention_backend = "native"
    with pytest.raises(ValueError, match="attention backend 'native' does not apply"):
        run(model, inputs)
