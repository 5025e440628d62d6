"""Running a FLUX model, and the oracle: the stock model whose attention gets a dense mask."""

from contextlib import contextmanager
from unittest import mock

import torch
from diffusers.models.transformers import transformer_flux

from clear_dit import Window

from .oracle import far_attention_within

FAR = 100  # a radius past every diagonal here


@torch.no_grad()
def run(model, inputs, **more):
    """The model's prediction."""
    return model(**inputs, **more).sample


def draw(pipe, prompt="a red house", **options):
    """Images of two steps of a tiny pipeline, 24 x 40 px (6 x 10 tokens), from a fixed seed."""
    usual = {
        "height": 24,
        "width": 40,
        "num_inference_steps": 2,
        "max_sequence_length": 6,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
    }
    return pipe(prompt, **usual | options).images


def assert_same(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-6)


def assert_differs(value, other):
    assert not torch.allclose(value, other, rtol=1e-2, atol=1e-3)


def image_mask(rows, columns, radius, text=3, references=0):
    """CLEAR's mask over text, image and reference images; the latter are seen and see all."""
    image = rows * columns
    mask = torch.ones(text + image + references, text + image + references, dtype=torch.bool)
    disc = Window(rows, columns, 0, radius).mask()
    mask[text : text + image, text : text + image] = disc
    return mask


@contextmanager
def dense_masks(*masks):
    """Inside, diffusers' self-attention gets the mask that has its length.

    Attention to other tokens, such as an IP-adapter's, gets none.
    """
    by_length = {len(mask): mask for mask in masks}
    original = transformer_flux.dispatch_attention_fn

    def masked(query, key, value, **options):
        if query.shape[1] == key.shape[1]:
            options["attn_mask"] = by_length[query.shape[1]]
        return original(query, key, value, **options)

    with mock.patch.object(transformer_flux, "dispatch_attention_fn", masked):
        yield


@contextmanager
def by_definition(rows, columns, radius, far, text=3, references=0):
    """Inside, diffusers' self-attention is CLEAR's by its definition, dense.

    Args:
        rows, columns: of the image, in tokens.
        far: whether with far keys.
        text, references: tokens before and behind the image.
    """
    if not far:
        with dense_masks(image_mask(rows, columns, radius, text, references)):
            yield
        return
    window = Window(rows, columns, text + references, radius, far_levels=4)
    original = transformer_flux.dispatch_attention_fn

    def attend(query, key, value, **options):
        if query.shape[1] != key.shape[1]:
            return original(query, key, value, **options)
        assert query.shape[1] == window.sequence_length
        return far_attention_within(query, key, value, text, window)

    with mock.patch.object(transformer_flux, "dispatch_attention_fn", attend):
        yield
