"""The oracle: a stock model whose every attention over the image gets CLEAR's dense mask."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch
from torch.nn import functional

from clear_dit import Window

from ..oracle import far_attention_within
from .models import FAMILIES, make_inputs, make_model, run, without_masks

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
    """Inside, diffusers' self-attention gets the mask that has its length besides its own.

    Where there are keys of a whole sequence, but queries of its last tokens alone, the last rows.
    """
    by_length = {len(mask): mask for mask in masks}
    original = functional.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, **options):
        mask = by_length.get(key.shape[-2])
        if mask is not None and not without_masks.get():
            mask = mask[-query.shape[-2] :]
            if attn_mask is None:
                attn_mask = mask
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & mask
            else:
                attn_mask = attn_mask.masked_fill(~mask, float("-inf"))
        return original(query, key, value, attn_mask=attn_mask, **options)

    with mock.patch.object(functional, "scaled_dot_product_attention", masked):
        yield


@contextmanager
def dense_far_keys(rows: int, columns: int, radius: int, *sequences: tuple[int, int, torch.Tensor]):
    """As `dense_masks`, with far keys for an image in sequences of certain lengths.

    Args:
        rows, columns, radius: of the image, in tokens.
        sequences: (length, place of the image's first token, mask besides the image's own).
    """
    by_length = {length: (start, mask) for length, start, mask in sequences}
    original = functional.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, **options):
        length, queries = key.shape[-2], query.shape[-2]
        if length not in by_length or without_masks.get():
            return original(query, key, value, attn_mask=attn_mask, **options)
        start, allowed = by_length[length]
        allowed = allowed[None, None]
        if attn_mask is not None:
            hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask != 0
            allowed = allowed & ~(hidden if hidden.ndim == 4 else hidden[None, None])
        window = Window(rows, columns, length - rows * columns, radius, far_levels=4)
        query = functional.pad(query, (0, 0, length - queries, 0))
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        out = far_attention_within(*tensors, start, window, allowed)
        return out.transpose(1, 2)[..., -queries:, :]

    with mock.patch.object(functional, "scaled_dot_product_attention", attend):
        yield


def dense_attention(
    name: str,
    rows: int,
    columns: int,
    radius: int,
    text: int = 5,
    references: tuple[tuple[int, int], ...] = (),
    far: bool = False,
    local_references: bool = False,
) -> AbstractContextManager[None]:
    """Inside, the attention of a family's layers over the image is CLEAR's, by the definition.

    Args:
        rows, columns, radius: of the image, in tokens.
        text: tokens of it.
        references: (rows, columns) of reference images.
        far: whether the image has far keys.
        local_references: whether reference images are local within themselves.
    """
    sequences = []
    count = sum(h * w for h, w in references)
    for length, start in FAMILIES[name].image_sequences(rows * columns, text, count):
        images = [] if far else [(start, rows, columns)]
        after = start + rows * columns
        for h, w in references if local_references and after < length else ():
            images.append((after, h, w))
            after += h * w
        sequences.append((length, start, local_mask(length, images, radius)))
    if far:
        return dense_far_keys(rows, columns, radius, *sequences)
    return dense_masks(*(mask for _, _, mask in sequences))


def expected(
    name: str,
    rows: int,
    columns: int,
    radius: int,
    text: int = 5,
    references: tuple[tuple[int, int], ...] = (),
    local_references: bool = False,
    far: bool = False,
    config: dict | None = None,
    **inputs,
) -> torch.Tensor:
    """What a family's tiny model predicts with CLEAR, by the definition.

    Args:
        rows, columns, radius, text, references, local_references, far: as in `dense_attention`.
        config: changes to the model's.
        inputs: the other arguments of `make_inputs`.
    """
    given = make_inputs(name, rows, columns, text, references=references, **inputs)
    with dense_attention(name, rows, columns, radius, text, references, far, local_references):
        return run(make_model(name, **config or {}), given)
