"""Models whose rotary tables hold several positions a token, and the oracle for them.

What is scaled here is every angle of a table, of text and image alike: no model would have such
positions, but attention knows nothing of where they come from.
"""

import functools
import inspect
from contextlib import ExitStack, contextmanager
from itertools import chain
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

from clear_dit import Window
from clear_dit.families.table import family_of

from ..oracle import two_positions_by_definition
from .models import FAMILIES, make_inputs, make_model, run

# Families with a rotary table, and the attribute of the model that makes it.
EMBEDDERS = {
    "flux": "pos_embed",
    "chroma": "pos_embed",
    "flux2": "pos_embed",
    "qwen-image": "pos_embed",
    "qwen-image-2.1": "pos_embed",
    "z-image": "rope_embedder",
    "hunyuan-image": "rope",
    "cogview4": "rope",
    "krea2": "rotary_emb",
    "flux3": "pos_embed",
    "longcat-image": "pos_embed",
    "ernie-image": "pos_embed",
}
TUPLES = ("flux", "chroma")  # which have further tables behind the first, not beside it
TABLES = ("image_rotary_emb", "freqs_cis", "rotary_emb")  # names of a processor's argument


class Several(nn.Module):
    """Stands for what makes a model's rotary tables, and puts further ones beside them.

    Args:
        stock: makes cos and sin, complex tables, or one of angles.
        factors: of the further tables' angles.
        in_tuple: whether cos and sin of a further table come behind the first in a tuple.
    """

    def __init__(self, stock, factors, in_tuple):
        super().__init__()
        self.stock, self.factors, self.in_tuple = [stock], factors, in_tuple
        self.pos_freqs = getattr(stock, "pos_freqs", None)  # of Qwen-Image: how many there are

    def forward(self, *args, **options):
        made = self.stock[0](*args, **options)
        if isinstance(made, torch.Tensor):
            return self.beside(made)
        if made[0].is_complex():
            return tuple(map(self.beside, made))
        pairs = [scaled(made, factor) for factor in (1, *self.factors)]
        if self.in_tuple:
            return tuple(chain(*pairs))
        return tuple(torch.cat(tables, dim=-1) for tables in zip(*pairs, strict=True))

    def beside(self, table):
        if not table.is_complex():
            return torch.cat([table, *(table * factor for factor in self.factors)], dim=-1)
        angles = [table.angle() * factor for factor in self.factors]
        further = [torch.polar(torch.ones_like(angle), angle) for angle in angles]
        return torch.cat([table, *further], dim=-1)


def scaled(table, factor):
    """cos and sin of angles times a factor; the same tensors where it is 1."""
    if factor == 1:
        return table
    cos, sin = table
    angles = torch.atan2(sin, cos) * factor
    return angles.cos(), angles.sin()


def give_positions(model, name, factors):
    """Let a model's tables hold further positions, the true ones times these factors."""
    attribute = EMBEDDERS[name]
    setattr(model, attribute, Several(getattr(model, attribute), factors, name in TUPLES))


@contextmanager
def dense(
    model, name, rows, columns, radius, factors, text=5, references=(), far=False, full=False
):
    """Within it stock processors understand such tables, by the definition, dense.

    Args:
        rows, columns, radius, text, references, far: as in `oracle.dense_attention`.
        full: whether attention is full, and the radius tells near pairs.
    """
    count = sum(h * w for h, w in references)
    starts = dict(FAMILIES[name].image_sequences(rows * columns, text, count))
    family = family_of(model)
    kinds = {
        type(module.processor)
        for module in model.modules()
        if type(getattr(module, "processor", None)).__name__ in family.processors
    }

    def attend(rotated, mask):
        value = rotated[0][2].transpose(1, 2)
        start, length, image = starts[value.shape[1]], value.shape[1], rows * columns
        places = torch.arange(length)
        inside = (places >= start) & (places < start + image)
        order = torch.cat([places[~inside], places[inside]])
        queries = rotated[0][0].shape[-2]  # the last ones, maybe of the image alone
        before = (0, 0, length - queries, 0)
        pairs = [
            [x.transpose(1, 2)[:, order] for x in (functional.pad(q, before), k)]
            for q, k, _ in rotated
        ]
        if mask is not None:
            mask = (mask if mask.dtype == torch.bool else mask == 0)[..., order]
            mask = mask if mask.shape[-2] == 1 else mask[..., order, :]
        levels = 10 if far else 0
        window = Window(rows, columns, length - image, radius, far_levels=levels)
        scale = value.shape[-1] ** -0.5
        out = two_positions_by_definition(
            pairs, value[:, order], window, None, scale, full=full, allowed=mask
        )
        return out[:, order.argsort()].transpose(1, 2)[..., -queries:, :].to(value.dtype)

    def wrapped(stock):
        @functools.wraps(stock)
        def call(*args, **options):
            given = inspect.signature(stock).bind(*args, **options)
            found = [each for each in TABLES if given.arguments.get(each) is not None]
            if not found:  # of text alone, without positions
                return stock(*args, **options)
            argument = found[0]
            tables = given.arguments[argument]
            rotated = []

            def note(query, key, value, attn_mask=None, **options):
                if key.shape[-2] in starts:
                    rotated.append((query, key, value))
                return original(query, key, value, attn_mask=attn_mask, **options)

            def answer(query, key, value, attn_mask=None, **options):
                if key.shape[-2] not in starts:  # text alone
                    return original(query, key, value, attn_mask=attn_mask, **options)
                return attend(rotated, attn_mask)

            original = functional.scaled_dot_product_attention
            for number in range(len(factors) + 1):
                given.arguments[argument] = table_of(tables, number, len(factors) + 1)
                with mock.patch.object(functional, "scaled_dot_product_attention", note):
                    stock(*given.args, **given.kwargs)
            given.arguments[argument] = table_of(tables, 0, len(factors) + 1)
            with mock.patch.object(functional, "scaled_dot_product_attention", answer):
                return stock(*given.args, **given.kwargs)

        return call

    with ExitStack() as stack:
        for kind in kinds:
            patch = mock.patch.object(kind, "__call__", wrapped(kind.__call__))
            stack.enter_context(patch)
        yield


def table_of(tables, number, positions):
    """One position's of a processor's argument."""
    if isinstance(tables, torch.Tensor):
        return tables.chunk(positions, dim=-1)[number]
    if len(tables) == 2 * positions and positions > 1:
        return tables[2 * number : 2 * number + 2]
    return tuple(table.chunk(positions, dim=-1)[number] for table in tables)


def expected(name, rows, columns, radius, factors, far=False, full=False, **inputs):
    """What a family's tiny model predicts with such positions, by the definition."""
    model = make_model(name)
    give_positions(model, name, factors)
    given = make_inputs(name, rows, columns, **inputs)
    text, references = inputs.get("text", 5), inputs.get("references", ())
    with dense(model, name, rows, columns, radius, factors, text, references, far, full):
        return run(model, given)
