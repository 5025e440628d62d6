"""Radii by layer and noise level: as the stock model under a dense mask in each layer."""

import copy
import pickle
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from support.families.models import FAMILIES, make_inputs, make_model, run
from support.families.oracle import dense_attention
from support.slow import slow
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from clear_dit import CLEARProcessor, Window, apply_clear, local_attention, remove_clear
from clear_dit.attention.layout import Layout
from clear_dit.families.table import attention_layers, family_of
from clear_dit.kernels.two_positions import Scaled
from clear_dit.kernels.window import EVERYTHING

ROWS, COLUMNS, TEXT = 6, 8, 5
# Each layer of these attends once, in the order of their names.
OTHERS = ("flux2", "z-image", "hunyuan-image", "cogview4", "krea2")


@contextmanager
def by_definition(name, radii, far=False):
    """Inside, the layers' attention is CLEAR's with these radii in turn; None is full attention."""
    original, turns, under_way = functional.scaled_dot_product_attention, iter(radii), []
    lengths = [n for n, _ in FAMILIES[name].image_sequences(ROWS * COLUMNS, TEXT, 0)]

    def attend(query, key, value, **options):
        if under_way or key.shape[-2] not in lengths or (radius := next(turns)) is None:
            return original(query, key, value, **options)
        under_way.append(radius)
        with dense_attention(name, ROWS, COLUMNS, radius, TEXT, far=far):
            out = functional.scaled_dot_product_attention(query, key, value, **options)
        under_way.clear()
        return out

    with mock.patch.object(functional, "scaled_dot_product_attention", attend):
        yield
    assert not list(turns), "the model has fewer layers"


def level(name, value):
    """The argument of a forward that says a noise level."""
    denoiser = family_of(make_model(name)).recipe.denoiser
    time = denoiser.arguments(torch.zeros(1, 1, 1, 1), torch.tensor([value]), {})[denoiser.time]
    return {denoiser.time: time}


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(
    "name", ["flux", "qwen-image", *(pytest.param(name, marks=slow) for name in OTHERS)]
)
def test_each_layer_has_its_own_radius(name, far):
    model, inputs = make_model(name), make_inputs(name, ROWS, COLUMNS, TEXT)
    names = list(attention_layers(model))
    radii = [2 + place % 3 for place in range(len(names))]
    radii[1] = None
    with by_definition(name, radii, far):
        expected = run(model, inputs)
    given = {layer: radius or 2 for layer, radius in zip(names, radii, strict=True)}
    del given[names[0]]
    apply_clear(model, {**given, "*": radii[0]}, far=far, dense_layers=[names[1]])
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["flux", "z-image"])
def test_full_attention_down_to_a_noise_level(name):
    model, inputs = make_model(name), make_inputs(name, ROWS, COLUMNS, TEXT)
    count = len(attention_layers(model))
    early, late = inputs | level(name, 0.9), inputs | level(name, 0.89)
    stock = copy.deepcopy(model)
    apply_clear(model, 2, far=False, dense_until=0.9)
    torch.testing.assert_close(run(model, early), run(stock, early), rtol=1e-4, atol=2e-5)
    with by_definition(name, [2] * count):
        expected = run(stock, late)
    torch.testing.assert_close(run(model, late), expected, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(run(model, late), run(stock, late), rtol=1e-2)


def test_settings_survive_copies_and_go_with_clear():
    model, inputs = make_model("flux"), make_inputs("flux", ROWS, COLUMNS, TEXT)
    stock, late = run(model, inputs | level("flux", 0.5)), inputs | level("flux", 0.5)
    names = list(attention_layers(model))
    (applied,) = apply_clear(model, 3, far=False, dense_layers=names[:1], dense_until=0.75)
    assert "radius dense/3, dense/dense by layer from noise levels 0.75 on" in str(applied)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, late), run(model, late))
    remove_clear(model)
    assert torch.equal(run(model, late), stock)


def test_gradients_are_those_of_the_definition():
    model = make_model("flux")
    stock = copy.deepcopy(model)
    inputs = make_inputs("flux", ROWS, COLUMNS, TEXT)
    names = list(attention_layers(model))
    apply_clear(model, 2, far=False, dense_layers=names[1:2])
    model.train().enable_gradient_checkpointing()
    radii = [None if name in names[1:2] else 2 for name in names]
    with by_definition("flux", radii):
        stock(**inputs).sample.square().sum().backward()
    model(**inputs).sample.square().sum().backward()
    for (key, value), (_, expected) in zip(
        model.named_parameters(), stock.named_parameters(), strict=True
    ):
        scale = float(expected.grad.abs().max())
        torch.testing.assert_close(value.grad, expected.grad, rtol=1e-3, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": {"blocks.7": 3, "*": 2}}, "no layer 'blocks.7'; its 4 layers are transf"),
        ({"radius": {"transformer_blocks.0.attn": 3}}, "radius names 1 of 4 layers, and not"),
        ({"radius": {}}, "radius must name a layer, got an empty map"),
        ({"radius": {"*": 0}}, r"radius of '\*' must be an integer of at least 1, got 0"),
        ({"radius": {"*": 1}, "far": True}, "far keys need a radius of at least 2"),
        ({"dense_layers": "transformer_blocks.0.attn"}, "dense_layers must be a list of names"),
        ({"dense_layers": ["nothing"]}, "the model has no layer 'nothing'"),
        ({"dense_until": 1.5}, "dense_until must be from 0 to 1, got 1.5"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        apply_clear(make_model("flux"), **settings)


def test_a_processor_alone_knows_neither_names_nor_levels():
    model, inputs = make_model("flux"), make_inputs("flux", ROWS, COLUMNS, TEXT)
    model.set_attn_processor(CLEARProcessor(2, dense_until=0.5))
    with pytest.raises(ValueError, match=r"need apply_clear or CLEARPipeline\.set_attn_processor"):
        run(model, inputs)


def test_a_batch_has_one_noise_level():
    model, inputs = make_model("flux"), make_inputs("flux", ROWS, COLUMNS, TEXT, batch=2)
    apply_clear(model, 2, dense_until=0.5)
    run(model, inputs | {"timestep": torch.tensor([0.6, 0.7])})
    with pytest.raises(ValueError, match="noise levels on both sides"):
        run(model, inputs | {"timestep": torch.tensor([0.4, 0.7])})


@pytest.mark.parametrize("grid", [None, (ROWS, COLUMNS)])
def test_a_layer_alone_knows_no_noise_level(grid):
    model = make_model("flux")
    apply_clear(model, 2, dense_until=0.5, grid=grid)
    block, rotary = model.single_transformer_blocks[0], torch.rand(2, ROWS * COLUMNS + TEXT, 16)
    tokens = torch.randn(1, ROWS * COLUMNS + TEXT, block.attn.inner_dim)
    with pytest.raises(ValueError, match="called outside of a forward of its model"):
        block.attn(tokens, image_rotary_emb=tuple(rotary))


def test_full_attention_with_two_positions_scores_near_pairs_by_the_true_ones():
    """As by its definition: a mask that chooses between two products."""
    processor = CLEARProcessor(2, far=False)
    processor.layer_radii = (EVERYTHING,)
    near, far, value = torch.randn(3, 2, 1, ROWS * COLUMNS + TEXT, 2, 16)
    layout = Layout(TEXT, ROWS, COLUMNS)
    scaled = Scaled(lambda: (far[0], far[1]))
    found = processor._local((near[0], near[1], value[0]), layout, scaled=scaled)
    disc = torch.zeros(layout.sequence_length, layout.sequence_length, dtype=torch.bool)
    disc[TEXT:, TEXT:] = Window(ROWS, COLUMNS, 0, 2).mask()
    products = [torch.einsum("bqhd,bkhd->bhqk", query, key) for query, key in (near, far)]
    scores = torch.where(disc, *products) / 4
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("image_alone", [False, True])
def test_a_window_that_sees_everything_is_full_attention(group, image_alone):
    """By every implementation, and with the log-sum-exp that others return."""
    window = Window(ROWS, COLUMNS, TEXT, EVERYTHING)
    query = torch.randn(2, window.sequence_length, 4, 16, dtype=torch.float64)
    key, value = torch.randn(2, 2, window.sequence_length, 4 // group, 16, dtype=torch.float64)
    if image_alone:
        window, query = window.image_queries, query[:, TEXT:]
    wide = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (key, value))
    expected = functional.scaled_dot_product_attention(query.transpose(1, 2), *wide)
    for impl in ("auto", "tiled", "reference"):
        found = local_attention(query, key, value, window, impl=impl)
        torch.testing.assert_close(found, expected.transpose(1, 2))
        found, _ = local_attention(query, key, value, window, impl=impl, return_lse=True)
        torch.testing.assert_close(found, expected.transpose(1, 2))
    assert window.attended_pairs() == query.shape[1] * key.shape[1]


@slow
@pytest.mark.parametrize("far", [False, True])
def test_compiled_layers_of_many_radii_share_their_graphs(far):
    """For each kind of block one, one of its first radius, and one where it is full."""
    model = make_model("flux", num_layers=4, num_single_layers=2)
    names = list(attention_layers(model))
    radii = dict(zip(names, (2, 3, 4, 5, 6, 2), strict=True))
    eager = copy.deepcopy(model)
    for each in (eager, model):
        apply_clear(each, radii, far=far, dense_layers=names[2:3], dense_until=0.5)
    torch.compiler.reset()
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=counter)
    for size in ((9, 9), (10, 12)):
        inputs = make_inputs("flux", *size, TEXT)
        for noise in (0.3, 0.8, 0.2):
            given = inputs | level("flux", noise)
            torch.testing.assert_close(run(model, given), run(eager, given), rtol=1e-4, atol=2e-5)
    assert counter.frame_count <= 6  # noise levels and sizes add none
    torch.compiler.reset()
