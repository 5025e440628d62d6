"""Positions beyond training: every family's table against the stock one and against formulas."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.transformers.transformer_cogview4 import CogView4RotaryPosEmbed
from diffusers.models.transformers.transformer_ernie_image import ErnieImageEmbedND3
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from diffusers.models.transformers.transformer_flux3 import Flux3PosEmbed
from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageRotaryPosEmbed
from diffusers.models.transformers.transformer_krea2 import Krea2RotaryPosEmbed
from diffusers.models.transformers.transformer_longcat_image import LongCatImagePosEmbed
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Rope
from diffusers.models.transformers.transformer_z_image import RopeEmbedder
from support.families.models import make_inputs, make_model, raster_ids, run
from support.families.oracle import FAR

from clear_dit import apply_clear
from clear_dit.attention.positions import Extension
from clear_dit.families.table import all_families, attention_layers

TEXT, ROWS, COLUMNS = 7, 20, 33
REFERENCE = (3, 5)
FAMILY = {family.name: family for family in all_families()}
LIMIT = 256  # of CogView4
BEGIN = torch.tensor([0.0, 512, 512]).double()  # of LongCat-Image's images

# Of published models: the module, its attribute of the model, theta and channels of its axes.
STOCK = {
    "flux2": (lambda: Flux2PosEmbed(2000, [32] * 4), "pos_embed", 2000, [32] * 4),
    "qwen-image": (
        lambda: QwenEmbedRope(10000, [16, 56, 56], scale_rope=True),
        *("pos_embed", 10000, [16, 56, 56]),
    ),
    "z-image": (
        lambda: RopeEmbedder(256.0, [32, 48, 48], [1536, 512, 512]),
        *("rope_embedder", 256, [32, 48, 48]),
    ),
    "hunyuan-image": (
        lambda: HunyuanImageRotaryPosEmbed((1, 1), (64, 64), 256.0),
        *("rope", 256, [64, 64]),
    ),
    "flux3": (lambda: Flux3PosEmbed(10000, [32] * 4), "pos_embed", 10000, [32] * 4),
    "krea2": (lambda: Krea2RotaryPosEmbed(1000, [32, 48, 48]), "rotary_emb", 1000, [32, 48, 48]),
    "qwen-image-2.1": (
        lambda: QwenImage21Rope(10000, [16, 56, 56]),
        *("pos_embed", 10000, [16, 56, 56]),
    ),
    "longcat-image": (
        lambda: LongCatImagePosEmbed(10000, [16, 56, 56]),
        *("pos_embed", 10000, [16, 56, 56]),
    ),
    "ernie-image": (
        lambda: ErnieImageEmbedND3(128, 256, (32, 48, 48)),
        *("pos_embed", 256, [32, 48, 48]),
    ),
    "cogview4": (
        lambda: CogView4RotaryPosEmbed(128, 2, (LIMIT, LIMIT)),
        *("rope", 10000, [64, 64]),
    ),
}
every = pytest.mark.parametrize("name", STOCK)


def extended(name, *how, **more):
    make, attribute, *_ = STOCK[name]
    model = SimpleNamespace(**{attribute: make()})
    return FAMILY[name].extended(model, Extension(*how, **more))[attribute]


def call(name, module, rows=ROWS, columns=COLUMNS, text=TEXT):
    """The tables of image (and a reference, where there can be one) and text, as the model asks."""
    if name == "flux3":
        images = torch.cat(image_positions(name, rows, columns))
        return [*module(images.float()), *module(text_positions("flux2", text=text).float())]
    if name in ("krea2", "longcat-image"):
        images = torch.cat(image_positions(name, rows, columns))
        tables = module(torch.cat([text_positions(name, text=text), images]).float())
        return [*(t[text:] for t in tables), *(t[:text] for t in tables)]
    if name == "ernie-image":  # of the second of a batch
        image, _ = image_positions(name, rows, columns, text)
        shorter = image - torch.tensor([2, 0, 0])
        ids = [torch.cat([one, text_positions(name, text=text)]) for one in (shorter, image)]
        return [*module(torch.stack(ids).float())[1, :, 0].split([len(image), text])]
    if name == "qwen-image-2.1":  # text, a reference, text, the image
        lengths = text - 3, REFERENCE[0] * REFERENCE[1], 3, rows * columns
        is_image = torch.tensor([False, True, False, True]).repeat_interleave(torch.tensor(lengths))
        table = module([(1, *REFERENCE), (1, rows, columns)], is_image, torch.device("cpu"))
        first, reference, second, image = table.split(lengths)
        return [torch.cat([image, reference]), torch.cat([first, second])]
    if name == "flux2":
        ids = [raster_ids(rows, columns, 0, 4), raster_ids(*REFERENCE, 10, 4)]
        text_ids = torch.zeros(text, 4)
        text_ids[:, 3] = torch.arange(text)
        return [*module(torch.cat(ids)), *module(text_ids)]
    if name == "qwen-image":
        shapes = [[(1, rows, columns), (1, *REFERENCE)]]
        return [*module(shapes, max_txt_seq_len=text, device=torch.device("cpu"))]
    if name == "z-image":
        image = raster_ids(rows, columns, text + 1, 3)
        captions = torch.zeros(text, 3)
        captions[:, 0] = torch.arange(1, text + 1)
        padded = torch.cat([image, torch.zeros(2, 3)]).int()
        return [module(padded), module(captions.int())]
    side = 2 if name == "cogview4" else 1
    return [*module(torch.empty(1, 4, rows * side, columns * side))]


def rotations(name, tables):
    """A complex number for every pair of channels, of image and text: (tokens, k * pairs)."""
    if name in ("qwen-image", "qwen-image-2.1", "z-image"):
        return tables
    if name == "ernie-image":  # angles
        return [torch.polar(torch.ones_like(t[:, ::2]), t[:, ::2]) for t in tables]
    if name == "cogview4":  # halves of a head
        tables = [torch.cat(t.chunk(2 * t.shape[1] // 128, dim=1)[::2], dim=1) for t in tables]
    else:
        tables = [t[:, ::2] for t in tables]
    return [torch.complex(*pair) for pair in zip(tables[::2], tables[1::2], strict=True)]


def image_positions(name, rows=ROWS, columns=COLUMNS, text=TEXT):
    """True positions of image, and of what stands behind it: (tokens, axes) each, float64."""
    if name == "flux2":
        return raster_ids(rows, columns, 0, 4).double(), raster_ids(*REFERENCE, 10, 4).double()
    if name == "flux3":
        image, reference = raster_ids(rows, columns, 0, 4) / 2, raster_ids(*REFERENCE, 0, 4) / 2
        reference[:, 3] = -1
        return image.double(), reference.double()
    if name == "krea2":
        return raster_ids(rows, columns, 0, 3).double(), raster_ids(*REFERENCE, 1, 3).double()
    if name == "ernie-image":
        return raster_ids(rows, columns, text, 3).double(), torch.zeros(0, 3).double()
    if name == "longcat-image":
        ids = [raster_ids(rows, columns, 1, 3), raster_ids(*REFERENCE, 2, 3)]
        image, reference = (each.double() + BEGIN for each in ids)
        return image, reference
    if name in ("qwen-image", "qwen-image-2.1"):
        places = (0, 1) if name == "qwen-image" else (text + max(REFERENCE), text - 3)
        image, reference = (
            raster_ids(*size, place, 3)
            for size, place in zip(((rows, columns), REFERENCE), places, strict=True)
        )
        for ids, (h, w) in ((image, (rows, columns)), (reference, REFERENCE)):
            ids -= torch.tensor([0, h - h // 2, w - w // 2])
        return image.double(), reference.double()
    if name == "z-image":
        return raster_ids(rows, columns, text + 1, 3).double(), torch.zeros(2, 3).double()
    return raster_ids(rows, columns, 0, 3)[:, 1:].double(), torch.zeros(0, 2).double()


def text_positions(name, start=None, text=TEXT):
    """Of text, in trained positions; None where it is not rotated."""
    places = torch.arange(text).double()
    if name == "qwen-image":
        return (start + places)[:, None].expand(-1, 3)
    if name == "qwen-image-2.1":
        places[-3:] += max(REFERENCE)
        return places[:, None].expand(-1, 3)
    if name == "krea2":
        return torch.zeros(text, 3).double()
    if name == "ernie-image":
        return places[:, None] * torch.tensor([1, 0, 0])
    if name == "longcat-image":
        return places[:, None] * torch.tensor([0, 1, 1])
    if name in ("flux2", "flux3"):
        return torch.stack([*3 * [0 * places], places], dim=1)
    if name == "z-image":
        return torch.stack([1 + places, 0 * places, 0 * places], dim=1)
    return None


def plain(name, positions, thetas=None):
    """The table by the definition, in complex128."""
    _, _, theta, dims = STOCK[name]
    angles = [
        torch.outer(
            one, (thetas or {}).get(axis, theta) ** (-torch.arange(0, dim, 2).double() / dim)
        )
        for axis, (one, dim) in enumerate(zip(positions.unbind(1), dims, strict=True))
    ]
    angles = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angles), angles)


def assert_close(found, expected):
    # Angles of some hundred radians in float32.
    torch.testing.assert_close(found.to(torch.complex128), expected, atol=1e-4, rtol=0)


def axes_of(name):
    """Axes of rows and columns."""
    return (0, 1) if len(STOCK[name][3]) == 2 else (1, 2)


def by_factors(name, factors):
    factor_of = torch.ones(len(STOCK[name][3]), dtype=torch.float64)
    factor_of[list(axes_of(name))] = torch.tensor(factors, dtype=torch.float64)
    return factor_of


@every
def test_factors_of_one_are_the_stock_table_bit_for_bit(name):
    stock = call(name, STOCK[name][0]())
    for method in FAMILY[name].methods:
        found = call(name, extended(name, method, (1.0, 1.0)))
        times = 2 if method == "two" else 1
        for one, other in zip(found, stock, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, torch.cat([other] * times, dim=1))
    found = call(name, extended(name, "none", (2.0, 3.0)))
    assert all(torch.equal(one, other) for one, other in zip(found, stock, strict=True))


@every
def test_extended_again_from_what_was_extended(name):
    _, attribute, *_ = STOCK[name]
    model = SimpleNamespace(**{attribute: extended(name, "yarn", (2.0, 3.0))})
    (again,) = FAMILY[name].extended(model, Extension("interpolation", (1.5, 2.0))).values()
    once = call(name, extended(name, "interpolation", (1.5, 2.0)))
    assert all(torch.equal(a, b) for a, b in zip(call(name, again), once, strict=True))


def divided(name, positions, factors):
    """By the factors; LongCat-Image's from where images begin."""
    begin = BEGIN if name == "longcat-image" else 0
    return begin + (positions - begin) / by_factors(name, factors)


@every
def test_interpolation_divides_positions(name):
    factors = (2.0, 3.0)
    found = rotations(name, call(name, extended(name, "interpolation", factors)))
    if name == "cogview4":  # an image of any size fills the table
        image = image_positions(name)[0] * LIMIT / torch.tensor([ROWS, COLUMNS])
    else:
        image = divided(name, torch.cat(image_positions(name)), factors)
    assert_close(found[0], plain(name, image))
    # Qwen-Image: the longer half side of the image that they make of it.
    text = text_positions(name, max(ROWS // 2 / 2, COLUMNS // 2 / 3))
    if text is not None:
        assert_close(found[1], plain(name, text))


@pytest.mark.parametrize("name", [name for name in STOCK if "ntk" in FAMILY[name].methods])
def test_ntk_changes_theta(name):
    factors, theta = (10.0, 4.0), STOCK[name][2]
    thetas = {axis: f * theta for axis, f in zip(axes_of(name), factors, strict=True)}
    found = rotations(name, call(name, extended(name, "ntk", factors)))
    image = torch.cat(image_positions(name))
    if name == "longcat-image":  # true up to where images begin
        assert_close(found[0], plain(name, BEGIN[None]) * plain(name, image - BEGIN, thetas))
        assert_close(found[1], plain(name, text_positions(name)))
        return
    assert_close(found[0], plain(name, image, thetas))
    text = text_positions(name, 0.0)
    if text is None:
        return
    expected = plain(name, text)
    if name == "qwen-image":  # behind the image's last column, and true from there
        expected = plain(name, torch.full((1, 3), COLUMNS // 2).double(), thetas) * expected
    assert_close(found[1], expected)


@every
def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones(name):
    factors, side = (2.0, 2.0), 32
    found = rotations(name, call(name, extended(name, "yarn", factors, side)))
    interpolated = rotations(name, call(name, extended(name, "interpolation", factors)))
    _, _, theta, dims = STOCK[name]
    true = image_positions(name)[0]
    if name == "cogview4":  # as an image half as large has them
        true, side = true * 2 * LIMIT / torch.tensor([ROWS, COLUMNS]), LIMIT
    if name == "flux3":  # half a position to a token
        side /= 2
    start = 0
    for axis, dim in enumerate(dims):
        turns = side * theta ** (-torch.arange(0, dim, 2).double() / dim) / (2 * math.pi)
        fast, slow = turns >= 2, turns <= 0.5
        columns = slice(start, start + dim // 2)
        image, divided, kept = (
            table[: ROWS * COLUMNS, columns]
            for table in (found[0], interpolated[0], plain(name, true))
        )
        assert_close(image[:, fast], kept[:, fast])
        assert_close(image[:, slow], divided[:, slow].to(torch.complex128))
        if axis in axes_of(name):
            assert slow.any()
            assert not torch.allclose(image[:, fast], divided[:, fast])
        start += dim // 2


EXTENT = 11  # trained, in tokens
# What leaves half a token free at both ends of it.
TO_EXTENT = tuple((tokens - 1) / (EXTENT - 2) for tokens in (ROWS, COLUMNS))


@every
@pytest.mark.parametrize("factors", [TO_EXTENT, (TO_EXTENT[0], 1.0)])
def test_two_positions_are_the_true_and_the_scaled(name, factors):
    """Beside each other; the image keeps away from both ends of the trained extent."""
    found = rotations(name, call(name, extended(name, "two", factors)))
    pairs = sum(STOCK[name][3]) // 2
    number = 1 + max(1, round(math.log2(max(factors))))
    assert {table.shape[1] for table in found} == {number * pairs}
    scaled_axes = [factor != 1 for factor in factors]
    image, rest = image_positions(name)
    by = by_factors(name, factors)
    if name == "cogview4":
        of_extent = torch.tensor(
            [
                LIMIT / (EXTENT if s else n)
                for s, n in zip(scaled_axes, (ROWS, COLUMNS), strict=True)
            ]
        )
        true = image * of_extent
        true[:, ~torch.tensor(scaled_axes)] = true[:, ~torch.tensor(scaled_axes)].floor()
        far = (image / by + 0.5 * torch.tensor(scaled_axes)) * of_extent
        far[:, ~torch.tensor(scaled_axes)] = true[:, ~torch.tensor(scaled_axes)]
    else:
        true, far = image, divided(name, image, factors)
        for axis, scaled in zip(axes_of(name), scaled_axes, strict=True):
            if scaled and name.startswith("qwen"):  # the trained extent is from -6 to 4
                far[:, axis] += -5.5 - far[:, axis].min()
            elif scaled:
                far[:, axis] += 0.25 if name == "flux3" else 0.5
    assert_close(found[0][:, :pairs], plain(name, torch.cat([true, rest])))
    assert_close(found[0][:, -pairs:], plain(name, torch.cat([far, rest])))
    text = text_positions(name, max(ROWS // 2, COLUMNS // 2))
    if text is not None:
        assert_close(found[1][:, :pairs], plain(name, text))
        # Qwen-Image: where text begins behind an image of the trained extent.
        text = text_positions(name, EXTENT // 2 if all(scaled_axes) else COLUMNS // 2)
        assert_close(found[1][:, -pairs:], plain(name, text))


def test_positions_of_qwen_image_between():
    """The image's end and the text keep their distance."""
    found = call("qwen-image", extended("qwen-image", "two", (8.0, 3.0)), 64, 24)
    slowest = 10000 ** (-54 / 56)  # of the axis of rows
    pairs, last, of_rows = 64, 64 * 24 - 1, 35
    gaps = [
        float((text[0, of_rows] / image[last, of_rows]).angle()) / slowest
        for image, text in zip(*(table.split(pairs, dim=1) for table in found), strict=True)
    ]
    assert len(gaps) == 4
    assert gaps[0] == pytest.approx(1, abs=1e-2)
    assert all(1 - 1e-2 <= gap <= 2 + 1e-2 for gap in gaps[1:])


@pytest.mark.parametrize(
    ("name", "rows", "columns", "text"),
    [
        ("z-image", 3, 600, 9),
        ("z-image", 600, 2, 1700),
        ("qwen-image", 2, 8300, 5),
        ("qwen-image-2.1", 2, 2100, 8300),
    ],
)
def test_beyond_the_stored_tables(name, rows, columns, text):
    image, of_text = call(name, extended(name), rows, columns, text)
    positions = torch.cat(image_positions(name, rows, columns, text))
    # Angles of thousands of radians in float32, as the stock tables have them.
    expected = plain(name, positions)
    torch.testing.assert_close(image.to(torch.complex128), expected, atol=1e-3, rtol=0)
    expected = plain(name, text_positions(name, columns // 2, text))
    torch.testing.assert_close(of_text.to(torch.complex128), expected, atol=1e-3, rtol=0)


def test_no_two_tokens_of_cogview4_share_a_position():
    rows, columns = 2, 300
    stock, none = (
        call("cogview4", one, rows, columns)
        for one in (STOCK["cogview4"][0](), extended("cogview4"))
    )
    assert len(stock[0].unique(dim=0)) == rows * LIMIT
    assert len(none[0].unique(dim=0)) == rows * columns
    positions = (
        image_positions("cogview4", rows, columns)[0] * LIMIT / torch.tensor([rows, columns])
    )
    assert_close(*rotations("cogview4", none), plain("cogview4", positions))


# Past each model's table.
SMALL = {
    "z-image": {"axes_lens": [256, 4, 5]},
    "cogview4": {"rope_axes_dim": (4, 5)},
    "sd3": {"pos_embed_max_size": 5},
}


def put(model, name, *how):
    family = FAMILY[name]
    for attribute, positions in family.extended(model, Extension(*how)).items():
        vars(model)[attribute] = positions


@pytest.mark.parametrize("name", [*STOCK, "sd3"])
def test_models_run_past_their_tables(name):
    """CLEAR sees the size, does not refuse it, and rotates as the stock processors do."""
    given = make_inputs(name, 4, 6, batch=2)
    model, stock = (make_model(name, **SMALL.get(name, {})) for _ in range(2))
    apply_clear(model, radius=FAR, far=False)
    if name in SMALL:
        with pytest.raises(ValueError, match="or extend the positions"):
            run(model, given)
    else:
        plain_result = run(model, given)
    for each in (model, stock):
        put(each, name, "interpolation", (1.0, 1.5))
    found = run(model, given)
    torch.testing.assert_close(found, run(stock, given), rtol=1e-4, atol=3e-6)
    if name not in SMALL:
        assert (found - plain_result).abs().max() > 1e-4


def test_computed_positions_of_z_image_are_those_of_a_longer_table():
    given = make_inputs("z-image", 4, 6)
    short, long = make_model("z-image", **SMALL["z-image"]), make_model("z-image")
    put(short, "z-image", "none")
    assert torch.equal(run(short, given), run(long, given))


# Layers over text alone, without positions.
UNROTATED = ("context_embedder", "text_fusion")


class Recorder:
    """A processor that passes everything on."""

    def __init__(self):
        self.tables = []

    def __call__(
        self,
        attn,
        hidden_states,
        *given,
        encoder_hidden_states=None,
        attention_mask=None,
        encoder_hidden_states_mask=None,
        image_rotary_emb=None,
        freqs_cis=None,
        rotary_emb=None,
        **unused,
    ):
        found = [*given[-1:], image_rotary_emb, freqs_cis, rotary_emb]
        (table,) = (one for one in found if one is not None)
        self.tables.append(table if isinstance(table, tuple) else (table,))
        if len(given) == 3:
            encoder_hidden_states = given[0]
        if encoder_hidden_states is None:
            return hidden_states
        return hidden_states, encoder_hidden_states


@every
def test_models_pass_tables_of_two_positions_on(name):
    """Beside each other, so that what a model does token by token it does to both."""
    seen = []
    for how in ((), ("two", (2.0, 1.5))):
        model, recorder = make_model(name), Recorder()
        put(model, name, *how)
        for layer_name, layer in model.named_modules():
            if hasattr(layer, "set_processor") and not layer_name.startswith(UNROTATED):
                layer.processor = recorder
        run(model, make_inputs(name, 4, 6))
        seen.append(recorder.tables)
    once, twice = seen
    assert len(once) >= len(attention_layers(model))
    for tables, both in zip(once, twice, strict=True):
        for table, wide in zip(tables, both, strict=True):
            assert wide.shape == (*table.shape[:-1], 2 * table.shape[-1])
            if name != "cogview4":  # whose true distances follow the factor
                assert torch.equal(wide[..., : table.shape[-1]], table)


@pytest.mark.parametrize("name", ["qwen-image", "krea2", "longcat-image"])
def test_proportional_attention_is_that_of_the_processor(name):
    given, model = make_inputs(name, 4, 6, batch=2), make_model(name)
    without = run(model, given)
    (attribute, positions), *_ = (
        FAMILY[name].extended(model, Extension(proportional_base=10)).items()
    )
    vars(model)[attribute] = positions
    through_table = run(model, given)
    del vars(model)[attribute]
    apply_clear(model, radius=FAR, far=False, proportional_base=10)
    torch.testing.assert_close(through_table, run(model, given), atol=1e-5, rtol=0)
    assert (through_table - without).abs().max() > 1e-3


def sd3_positions(embed, rows, columns, dtype=torch.float32):
    """What is added to a latent's tokens, (rows, columns, channels)."""
    return embed(torch.zeros(1, 4, 2 * rows, 2 * columns, dtype=dtype))[0].unflatten(
        0, (rows, columns)
    )


@pytest.fixture
def patch_embed():
    embed = PatchEmbed(16, 16, 2, 4, 24, pos_embed_max_size=12)
    torch.nn.init.zeros_(embed.proj.bias)
    return embed.requires_grad_(False)


def test_sd3s_table_is_resampled(patch_embed):
    """The middle of it, half a token from both ends of what the smaller image has."""
    model = SimpleNamespace(pos_embed=patch_embed)
    embed = FAMILY["sd3"].extended(model, Extension("interpolation", (2.0, 1.5)))["pos_embed"]
    table = patch_embed.pos_embed.unflatten(1, (12, 12)).movedim(-1, 1)

    def expected(rows, columns):
        places = torch.meshgrid(rows / 5.5 - 1, columns / 5.5 - 1, indexing="ij")[::-1]
        return torch.nn.functional.grid_sample(
            table, torch.stack(places, -1)[None], mode="bicubic", padding_mode="border",
            align_corners=True,
        )[0].movedim(0, -1)  # fmt: skip

    # Of 6 rows from the fourth on, and of 8 columns from the third; and of all.
    middle = expected(torch.linspace(3.5, 7.5, 12), torch.linspace(2.5, 8.5, 12))
    whole = expected(torch.linspace(0.5, 10.5, 24), torch.linspace(0.5, 10.5, 18))
    found = sd3_positions(embed, 12, 12)
    torch.testing.assert_close(found, middle, atol=1e-5, rtol=0)
    torch.testing.assert_close(sd3_positions(embed, 24, 18), whole, atol=1e-5, rtol=0)
    assert embed.limits == (24, 18)
    assert (sd3_positions(patch_embed, 12, 12) - found).abs().max() > 0.5
    half = embed.to(torch.bfloat16)
    assert sd3_positions(half, 12, 12, torch.bfloat16).dtype == torch.bfloat16
    assert "cropped_pos_embed" not in vars(patch_embed)


def test_sd3s_stock_table_where_nothing_is_extended(patch_embed):
    model = SimpleNamespace(pos_embed=patch_embed)
    for how in ((), ("none", (2.0, 2.0)), ("interpolation", (1.0, 1.0))):
        assert FAMILY["sd3"].extended(model, Extension(*how))["pos_embed"] is patch_embed
    (embed,) = FAMILY["sd3"].extended(model, Extension("interpolation", (1.5, 1.0))).values()
    model = SimpleNamespace(pos_embed=embed)
    assert FAMILY["sd3"].extended(model, Extension())["pos_embed"] is patch_embed
    # An axis that stays is the stock one's, odd sizes included.
    rows = patch_embed.pos_embed.unflatten(1, (12, 12))
    (embed,) = FAMILY["sd3"].extended(model, Extension("interpolation", (1.0, 0.9999))).values()
    torch.testing.assert_close(sd3_positions(embed, 5, 11), rows[0, 3:8, :11], atol=1e-2, rtol=0)
    computed = SimpleNamespace(pos_embed=PatchEmbed(16, 16, 2, 4, 24))
    found = FAMILY["sd3"].extended(computed, Extension("interpolation", (2.0, 2.0)))
    assert found["pos_embed"] is computed.pos_embed  # for the trained extent already


def test_sd3_ends_where_its_table_does():
    model = make_model("sd3", **SMALL["sd3"])
    apply_clear(model)
    put(model, "sd3", "interpolation", (1.0, 1.5))
    with pytest.raises(ValueError, match="has positions for 5 x 7 tokens, got 4 x 8"):
        run(model, make_inputs("sd3", 4, 8))


@pytest.mark.parametrize("name", [*STOCK, "sd3"])
def test_positions_of_somebody_else_are_refused(name):
    attribute = STOCK[name][1] if name in STOCK else "pos_embed"
    model = SimpleNamespace(**{attribute: torch.nn.Identity()})
    with pytest.raises(ValueError, match=rf"can be extended, but .*s {attribute} is a Ident"):
        FAMILY[name].extended(model, Extension("interpolation", (2.0, 2.0)))


def test_what_a_family_cannot_have_is_refused():
    for name, method, known in (
        ("sd3", "two", "none, interpolation"),
        ("cogview4", "ntk", "none, yarn, interpolation, two"),
    ):
        with pytest.raises(ValueError, match=f"rope '{method}' does not work .* from: {known}"):
            FAMILY[name].extended(make_model(name), Extension(method))
    for name in ("flux2", "flux3", "sd3"):
        with pytest.raises(ValueError, match="proportional_base does not work by"):
            FAMILY[name].extended(make_model(name), Extension(proportional_base=100))
