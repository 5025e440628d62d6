"""The oracle: a stock model whose every attention over the image gets CLEAR's dense mask."""

from collections.abc import Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn import functional

from .models import FAMILIES, make_inputs, make_model, run

FAR = 100  # a radius past every diagonal here, in tokens


def local_mask(length: int, images: Sequence[tuple[int, int, int]], radius: int) -> torch.Tensor:
    """(length, length) bool: every token sees every other one, except inside an image.

    There a token at (y, x) sees those at (y', x') with (y - y')^2 + (x - x')^2 < radius^2.

    Args:
        length: of the sequence, in tokens.
        images: (start, rows, columns) of each.
    """
    mask = torch.ones(length, length, dtype=torch.bool)
    for start, rows, columns in images:
        ys, xs = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
        stop = start + rows * columns
        for y in range(rows):
            for x in range(columns):
                inside = (ys - y) ** 2 + (xs - x) ** 2 < radius**2
                mask[start + y * columns + x, start:stop] = inside.flatten()
    return mask


@contextmanager
def dense_masks(*masks: torch.Tensor):
    """Inside, diffusers' self-attention gets the mask that has its length besides its own."""
    by_length = {len(mask): mask for mask in masks}
    original = functional.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, **options):
        mask = by_length.get(query.shape[-2])
        if mask is not None and key.shape[-2] == query.shape[-2]:
            if attn_mask is None:
                attn_mask = mask
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & mask
            else:
                attn_mask = attn_mask.masked_fill(~mask, float("-inf"))
        return original(query, key, value, attn_mask=attn_mask, **options)

    with mock.patch.object(functional, "scaled_dot_product_attention", masked):
        yield


def expected(
    name: str,
    rows: int,
    columns: int,
    radius: int,
    text: int = 5,
    references: tuple[tuple[int, int], ...] = (),
    local_references: bool = False,
    config: dict | None = None,
    **inputs,
) -> torch.Tensor:
    """What a family's tiny model predicts with CLEAR, by the definition.

    Args:
        local_references: whether reference images are local within themselves.
        config: changes to the model's.
        inputs: the other arguments of `make_inputs`.
    """
    count = sum(h * w for h, w in references)
    masks = []
    for length, start in FAMILIES[name].image_sequences(rows * columns, text, count):
        images = [(start, rows, columns)]
        if local_references:
            after = start + rows * columns
            for h, w in references:
                images.append((after, h, w))
                after += h * w
        masks.append(local_mask(length, images, radius))
    given = make_inputs(name, rows, columns, text, references=references, **inputs)
    with dense_masks(*masks):
        return run(make_model(name, **config or {}), given)
