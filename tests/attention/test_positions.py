"""Position tables for larger images: what each method does, and who still has to read them."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from support.slow import slow

from clear_dit import CLEARFluxPipeline, CLEARProcessor, apply_clear
from clear_dit.attention import processor
from clear_dit.attention.grid import Layout, layout_from_rotary
from clear_dit.attention.positions import METHODS, ExtendedPosEmbed, Extension
from clear_dit.kernels.two_positions import two_position_attention

THETA, FLUX_AXES = 10000, (16, 56, 56)
TEXT, ROWS, COLUMNS = 7, 20, 33


@pytest.fixture
def ids(position_ids):
    return torch.cat([torch.zeros(TEXT, 3), position_ids(ROWS, COLUMNS)])


def table(ids, method, factors=(2.0, 3.0), axes=FLUX_AXES, **options):
    return ExtendedPosEmbed(THETA, axes, method, factors, **options)(ids)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axes", [FLUX_AXES, (8, 28, 28), (4, 6, 6)])
def test_factor_of_one_is_the_stock_table_bit_for_bit(ids, axes, dtype):
    ids = ids.to(dtype)
    stock = FluxPosEmbed(THETA, axes)(ids)
    assert same(table(ids, "none", axes=axes), stock)
    for method in METHODS:
        found = table(ids, method, (1.0, 1.0), axes)
        assert same(found, 2 * stock if method == "two" else stock)
    base = len(ids)  # where proportional attention has the trained scale
    assert same(table(ids, "none", axes=axes, proportional_base=base), stock)
    assert {t.dtype for t in table(ids, "yarn", axes=axes)} == {torch.float32}


def test_ntk_is_the_published_one(ids):
    assert same(table(ids, "ntk", (10.0, 10.0)), FluxPosEmbed(10 * THETA, FLUX_AXES)(ids))


def by_axis(ids, embeds):
    """A table put together from the axes of three."""
    tables = [embed(ids) for embed in embeds]
    ends = [0, 16, 72, 128]
    return [
        torch.cat([tables[axis][part][:, ends[axis] : ends[axis + 1]] for axis in range(3)], dim=1)
        for part in range(2)
    ]


def test_each_axis_has_its_factor(ids):
    ids[TEXT:, 0] = 1  # a second group: its axis stays as it is
    expected = by_axis(ids, [FluxPosEmbed(THETA * f, FLUX_AXES) for f in (1, 2, 3)])
    assert same(table(ids, "ntk"), expected)
    stock = FluxPosEmbed(THETA, FLUX_AXES)
    expected = stock(ids / torch.tensor([1.0, 2.0, 3.0]))
    for one, other in zip(table(ids, "interpolation"), expected, strict=True):
        assert (one - other).abs().max() < 1e-5


def test_interpolated_grid_keeps_the_trained_extent(position_ids):
    wide = table(position_ids(24, 60), "interpolation", (2.0, 2.0))[0].reshape(24, 60, -1)
    trained = table(position_ids(12, 30), "none")[0].reshape(12, 30, -1)
    torch.testing.assert_close(wide[::2, ::2], trained, atol=1e-6, rtol=0)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    """FLUX.1: of 28 pairs of channels, over 64 tokens 5 turn twice, 18 less than half a turn."""
    stock, yarn, shorter = (
        [axis.frequencies() for axis in extension.axes(THETA, FLUX_AXES, rows=1)]
        for extension in (
            Extension(),
            Extension("yarn", (4.0, 1.0), trained_side=64),
            Extension("yarn", (4.0, 4.0), trained_side=32),
        )
    )
    for axis in (0, 2):
        assert torch.equal(yarn[axis], stock[axis])
    divided = (stock[1] / yarn[1]).tolist()
    assert divided[:5] == [1.0] * 5
    assert divided[10:] == pytest.approx([4.0] * 18)
    assert all(1 < a < b < 4 for a, b in pairwise(divided[5:10]))
    turns = 64 * THETA ** (-14 / 56) / (2 * math.pi)  # of pair 7
    kept = (turns - 0.5) / 1.5  # the paper's ramp, from half a turn to 2
    assert divided[7] == pytest.approx(1 / (kept + (1 - kept) / 4))
    assert (shorter[1] < yarn[1])[3:9].all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factors", [(2.0, 2.0), (1.5, 2.7), (16.0, 16.0)])
@pytest.mark.parametrize("axes", [FLUX_AXES, (8, 28, 28)])
def test_the_grid_is_found_in_every_table(position_ids, method, factors, axes):
    for rows, columns in ((20, 33), (512, 3), (2, 300)):
        ids = torch.cat([torch.zeros(TEXT, 3), position_ids(rows, columns)])
        cos, sin = table(ids, method, factors, axes, proportional_base=100)[:2]
        assert layout_from_rotary(cos, sin) == Layout(TEXT, rows, columns)
        assert layout_from_rotary(cos, sin, TEXT) == Layout(TEXT, rows, columns)


@pytest.mark.parametrize("text", [0, 1, TEXT])
def test_two_positions_are_the_true_and_the_scaled(position_ids, text):
    """The image keeps away from the ends of the trained extent; text stays at its beginning."""
    reference = torch.tensor([[1.0, 4.0, 6.0]])  # of another image: stays where it is
    ids = torch.cat([torch.zeros(text, 3), position_ids(ROWS, COLUMNS), reference])
    cos, sin, *_, far_cos, far_sin = table(ids, "two", (2.0, 3.0))
    far = far_cos, far_sin
    assert same((cos, sin), table(ids, "none"))
    scaled = ids.clone()
    scaled[text:-1] = ids[text:-1] / torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([0.0, 0.5, 0.5])
    assert same(far, table(scaled, "none"))
    scaled[text:-1, 2] = ids[text:-1, 2]  # an axis of the trained extent stays as it is
    assert same(table(ids, "two", (2.0, 1.0))[2:], table(scaled, "none"))


def test_positions_between_are_scaled_twice_as_much_each(position_ids):
    ids = position_ids(ROWS, COLUMNS)
    eight = table(ids, "two", (8.0, 3.0))
    assert len(eight) == 2 * 4
    assert same(eight[2:4], table(ids, "two", (2.0, 2.0))[2:])
    assert same(eight[4:6], table(ids, "two", (4.0, 3.0))[-2:])
    assert same(table(ids, "two", (4.2, 1.0))[:2], table(ids, "none"))
    assert [len(table(ids, "two", (f, 1.0))) for f in (0.5, 2.1, 2.9, 4.3)] == [4, 4, 6, 6]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("route", ["bare", "apply_clear"])
def test_local_attention_finds_its_window(tiny_transformer, tiny_inputs, method, route):
    model, inputs = tiny_transformer(), tiny_inputs(6, 11, batch=2)
    model.pos_embed = ExtendedPosEmbed(THETA, (4, 6, 6), method, (2.0, 1.5), 8, 20)
    with torch.no_grad():
        model.set_attn_processor(CLEARProcessor(radius=3, grid=(6, 11)))
        expected = model(**inputs).sample
        if route == "bare":
            model.set_attn_processor(CLEARProcessor(radius=3))
        else:
            apply_clear(model, radius=3)
        assert torch.equal(model(**inputs).sample, expected)


def test_proportional_attention_is_that_of_the_processor(tiny_transformer, tiny_inputs):
    """Through the table it holds for stock attention too: scale sqrt(log_base(tokens) / dim)."""
    model, inputs = tiny_transformer(), tiny_inputs(6, 11, batch=2)
    stock, processors = model.pos_embed, model.attn_processors
    with torch.no_grad():
        plain = model(**inputs).sample
        model.set_attn_processor(CLEARProcessor(radius=99, proportional_base=10))
        expected = model(**inputs).sample
        model.set_attn_processor(processors)
        model.pos_embed = ExtendedPosEmbed(stock.theta, stock.axes_dim, proportional_base=10)
        through_table = model(**inputs).sample
    torch.testing.assert_close(through_table, expected, atol=1e-5, rtol=0)
    assert (through_table - plain).abs().max() > 1e-3


@torch.no_grad()
def test_layers_rotate_by_every_position(tiny_transformer, tiny_inputs, monkeypatch):
    """What lies between with a factor of 4 is far with a factor of 2; local attention has none."""
    inputs, seen = tiny_inputs(24, 8), []

    def spy(near, scaled, value, window, **options):
        seen.append((near, scaled, window))
        return two_position_attention(near, scaled, value, window, **options)

    monkeypatch.setattr(processor, "two_position_attention", spy)
    for far, factor in ((True, 4.0), (True, 2.0), (False, 4.0)):
        model = tiny_transformer()
        apply_clear(model, radius=3, far=far)
        model.pos_embed = ExtendedPosEmbed(THETA, (4, 6, 6), "two", (factor, factor), 8)
        model(**inputs)
    layers = len(seen) // 3
    four, two, local = seen[0], seen[layers], seen[2 * layers]
    assert [len(scaled.between) for _, scaled, _ in (four, two, local)] == [1, 0, 0]
    assert four[2].levels_by_position(1)[1] == range(2, 3)
    assert same(four[0], two[0])
    assert same(four[1].between[0](), two[1].far())
    assert same(four[1].far(), local[1].far())
    assert not same(four[1].far(), two[1].far())


@slow
def test_compiled_blocks_take_new_positions_as_they_are(tiny_transformer, tiny_inputs):
    plain, model = (tiny_transformer(num_layers=1, num_single_layers=0) for _ in range(2))
    for each in (plain, model):
        apply_clear(each, radius=3)
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    for method, size, factor in (
        *(("none", (4, 6), 2.0), ("yarn", (12, 8), 2.0)),
        *(("two", (24, 8), 2.0), ("two", (24, 8), 4.0)),
    ):
        inputs = tiny_inputs(*size)
        for each in (plain, model):
            each.pos_embed = ExtendedPosEmbed(THETA, (4, 6, 6), method, (factor, factor), 8, 43)
        first = method != "yarn"  # "two" has more tables, and cells that are near
        with (
            torch.no_grad(),
            torch.compiler.set_stance("default" if first else "fail_on_recompile"),
        ):
            expected = plain(**inputs).sample
            torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=0)
    torch.compiler.reset()


def test_true_configuration():
    with torch.device("meta"):
        stock = FluxTransformer2DModel(num_layers=0, num_single_layers=0).pos_embed
    assert (stock.theta, tuple(stock.axes_dim)) == (THETA, FLUX_AXES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "YaRN"}, "rope must be one of none, ntk, yarn, interpolation, two; got 'YaRN'"),
        ({"method": "ntk", "factors": (2.0, 0.0)}, r"two positive numbers .*, got \(2.0, 0.0\)"),
        ({"method": "ntk", "factors": (math.inf, 1.0)}, "two positive numbers"),
        ({"method": "ntk", "factors": (2.0,)}, "two positive numbers"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExtendedPosEmbed(THETA, FLUX_AXES, **options)


# 4112 pixels are 257 tokens.
SIDE = 4112 // 16


def distinct_rows(ids):
    """Rows of tokens that FLUX.1's rotary table tells apart, of an image one token wide."""
    return len(FluxPosEmbed(THETA, FLUX_AXES)(ids)[0].unique(dim=0))


def test_stock_ids_collapse_in_bfloat16_and_ours_do_not():
    arguments = (1, SIDE, SIDE, "cpu", torch.bfloat16)
    stock = FluxPipeline._prepare_latent_image_ids(*arguments)
    ours = CLEARFluxPipeline._prepare_latent_image_ids(*arguments)
    assert len(stock[:, 1].unique()) == SIDE  # 255, 256 and no more: the last that is exact
    for side, left in ((SIDE + 1, SIDE), (512, 385)):  # 8192 pixels
        arguments = (1, side, 1, "cpu", torch.bfloat16)
        assert distinct_rows(FluxPipeline._prepare_latent_image_ids(*arguments)) == left
        assert distinct_rows(CLEARFluxPipeline._prepare_latent_image_ids(*arguments)) == side
    assert ours.dtype == torch.float32
    assert ours[:, 1].reshape(SIDE, SIDE)[:, 5].tolist() == list(range(SIDE))
    assert ours[:, 2].reshape(SIDE, SIDE)[5].tolist() == list(range(SIDE))


@pytest.mark.parametrize("size", [(300, 2), (2, 300)])
def test_apply_clear_repairs_the_ids_of_a_stock_pipeline(
    tiny_transformer, tiny_inputs, position_ids, size
):
    model, seen = tiny_transformer(), []
    model.pos_embed.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    inputs = tiny_inputs(*size) | {"img_ids": position_ids(*size, torch.bfloat16)}
    with torch.no_grad():
        model(**inputs)
        apply_clear(model, radius=2)
        model(**inputs)
    stock, repaired = (len(cos[3:].unique(dim=0)) for cos in seen)
    assert (stock, repaired) == (2 * 279, 600)
