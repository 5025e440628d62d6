"""CLEARProcessor against the stock processor: same results where it must, the window elsewhere."""

import pytest
import torch
from diffusers.models.transformers import transformer_flux
from support.models import FAR, assert_same, run

from clear_dit import CLEARProcessor, Window, apply_clear

SHAPES = [(4, 4), (3, 7), (6, 2), (1, 9), (9, 1), (1, 1)]


def bare(model, **settings):
    model.set_attn_processor(CLEARProcessor(**settings))


ROUTES = {"bare": bare, "apply_clear": apply_clear}


@pytest.fixture(params=list(ROUTES))
def route(request):
    return ROUTES[request.param]


@pytest.mark.parametrize("shape", SHAPES)
def test_radius_past_the_diagonal_is_the_stock_model(tiny_transformer, tiny_inputs, route, shape):
    model, inputs = tiny_transformer(), tiny_inputs(*shape, batch=2)
    expected = run(model, inputs)
    route(model, radius=FAR)
    assert_same(run(model, inputs), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
def test_small_radius_is_the_stock_model_under_the_mask(
    tiny_transformer, tiny_inputs, route, shape, impl
):
    model, inputs = tiny_transformer(), tiny_inputs(*shape, batch=2)
    mask = Window(*shape, text_length=3, radius=2).mask()
    expected = run(model, inputs, joint_attention_kwargs={"attention_mask": mask})
    route(model, radius=2, impl=impl)
    assert_same(run(model, inputs), expected)


def test_resolution_text_and_batch_change_between_calls(tiny_transformer, tiny_inputs, route):
    stock, model = tiny_transformer(), tiny_transformer()
    route(model, radius=2)
    # Classifier-free guidance: two text lengths in turn; 4 x 6 and 6 x 4 have the same length.
    calls = [(4, 6, 3, 1), (4, 6, 5, 1), (4, 6, 3, 1), (6, 4, 3, 2), (4, 6, 3, 1), (5, 5, 0, 1)]
    for rows, columns, text, batch in calls:
        inputs = tiny_inputs(rows, columns, text, batch=batch)
        mask = Window(rows, columns, text, 2).mask()
        expected = run(stock, inputs, joint_attention_kwargs={"attention_mask": mask})
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
    route(model, radius=4)
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
    bare(model, radius=2, grid=(6, 4))
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
