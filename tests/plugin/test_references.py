"""Reference images, as in FLUX.1-Kontext: tokens behind the image, seen by all, seeing all."""

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image
from support.models import (
    FAR,
    assert_differs,
    assert_same,
    by_definition,
    dense_masks,
    image_mask,
    run,
)

from clear_dit import CLEARProcessor, apply_clear, remove_clear

# Rows and columns of the reference images.
REFERENCES = {"one": [(3, 5)], "of the image's size": [(4, 6)], "two": [(2, 3), (5, 1)]}


@pytest.fixture
def edit_inputs(tiny_inputs, position_ids):
    """Inputs with reference images behind the image, each of its own group."""

    def make(rows, columns, references, text=3, dtype=torch.float32):
        ids = [position_ids(rows, columns, dtype)]
        for group, size in enumerate(references, start=1):
            ids.append(position_ids(*size, dtype))
            ids[-1][:, 0] = group
        ids = torch.cat(ids)
        return tiny_inputs(1, len(ids), text) | {"img_ids": ids}

    return make


def count(references):
    return sum(rows * columns for rows, columns in references)


def bare(model, **settings):
    model.set_attn_processor(CLEARProcessor(**settings))


@pytest.mark.parametrize("references", REFERENCES.values(), ids=REFERENCES)
@pytest.mark.parametrize("route", [bare, apply_clear])
@pytest.mark.parametrize("far", [False, True])
def test_everyone_sees_the_references(tiny_transformer, edit_inputs, route, references, far):
    model, inputs = tiny_transformer(), edit_inputs(4, 6, references)
    full = run(model, inputs)
    with by_definition(4, 6, 2, far, references=count(references)):
        expected = run(model, inputs)
    route(model, radius=FAR, far=far)
    assert_same(run(model, inputs), full)
    route(model, radius=2, far=far)
    assert_same(run(model, inputs), expected)
    assert_differs(expected, full)


@pytest.mark.parametrize("impl", ["auto", "tiled"])
def test_implementations_and_pooling(tiny_transformer, edit_inputs, impl):
    model, inputs = tiny_transformer(), edit_inputs(5, 7, [(3, 4)])
    apply_clear(model, radius=2, down_factor=2, impl="reference")
    expected = run(model, inputs)
    apply_clear(model, radius=2, down_factor=2, impl=impl)
    assert_same(run(model, inputs), expected)


def test_from_call_to_call(tiny_transformer, edit_inputs, tiny_inputs):
    stock, model = tiny_transformer(), tiny_transformer()
    apply_clear(model, radius=2, far=False)
    # A reference of 2 x 3 tokens, none, one as if the image had another row, a longer text.
    for text, references in ((3, [(2, 3)]), (3, []), (3, [(1, 6)]), (5, [(2, 3)])):
        inputs = edit_inputs(4, 6, references, text)
        with dense_masks(image_mask(4, 6, 2, text, count(references))):
            expected = run(stock, inputs)
        assert_same(run(model, inputs), expected)


def test_rounded_ids_of_the_image_are_put_right(tiny_transformer, edit_inputs):
    exact = edit_inputs(2, 300, [(2, 3)])
    expected = run(tiny_transformer(num_single_layers=0), exact)
    model = tiny_transformer(num_single_layers=0)
    apply_clear(model, radius=400)
    assert_same(run(model, edit_inputs(2, 300, [(2, 3)], dtype=torch.bfloat16)), expected)


@pytest.mark.parametrize("far", [False, True])
def test_gradients(tiny_transformer, edit_inputs, far):
    models, inputs = [tiny_transformer(), tiny_transformer()], edit_inputs(4, 6, [(2, 3)])
    with by_definition(4, 6, 2, far, references=6):
        models[0](**inputs).sample.square().sum().backward()
    apply_clear(models[1], radius=2, far=far)
    models[1](**inputs).sample.square().sum().backward()
    for expected, received in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(received.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_one_row_is_refused_where_only_the_rotary_table_is_known(tiny_transformer, edit_inputs):
    model, inputs = tiny_transformer(), edit_inputs(1, 6, [(1, 6)])
    bare(model, radius=2)
    with pytest.raises(ValueError, match=r"tell 6 tokens of reference images from further rows of"):
        run(model, inputs)
    apply_clear(model, radius=FAR)
    assert_same(run(model, inputs), run(tiny_transformer(), inputs))


def test_latents_that_contradict_the_ids(tiny_transformer, edit_inputs):
    model, inputs = tiny_transformer(), edit_inputs(4, 6, [(2, 3)])
    inputs["hidden_states"] = inputs["hidden_states"][:, :-1]
    apply_clear(model)
    with pytest.raises(ValueError, match=r"24 image tokens and 6 of reference images, .* 29"):
        run(model, inputs)
    bare(model)
    with pytest.raises(ValueError, match="4 x 6 image tokens and 6 of reference images, but the"):
        model.transformer_blocks[0].attn(
            torch.randn(1, 29, 32),
            torch.randn(1, 3, 32),
            image_rotary_emb=model.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]])),
        )


def edit(pipe, size):
    return pipe(
        image=Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)),
        prompt="a red house",
        height=size[0],
        width=size[1],
        max_area=size[0] * size[1],
        num_inference_steps=2,
        max_sequence_length=6,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        _auto_resize=False,
    ).images


def test_kontext_pipeline(tiny_pipeline):
    """Tokens are 4 x 4 pixels: a reference of 4 x 6 tokens."""
    stock, pipe = tiny_pipeline(FluxKontextPipeline), tiny_pipeline(FluxKontextPipeline)
    assert isinstance(pipe.transformer, FluxTransformer2DModel)
    for size in ((24, 40), (40, 16)):
        full = edit(stock, size)
        with dense_masks(image_mask(size[0] // 4, size[1] // 4, 2, text=6, references=24)):
            local = edit(stock, size)
        apply_clear(pipe, radius=FAR)
        np.testing.assert_allclose(edit(pipe, size), full, atol=1e-5)
        apply_clear(pipe, radius=2, far=False)
        np.testing.assert_allclose(edit(pipe, size), local, atol=1e-5)
        assert np.abs(local - full).max() > 1e-3
        assert remove_clear(pipe)
        assert np.array_equal(edit(pipe, size), full)
