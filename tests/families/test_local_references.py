"""references="local": reference images that see of themselves only their discs."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import FluxKontextPipeline
from PIL import Image
from support.families.models import FAMILIES, make_inputs, make_model, run
from support.families.oracle import FAR, dense_masks, expected, local_mask
from support.slow import few, slow
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from clear_dit import CLEARProcessor, apply_clear
from clear_dit.attention.grid import reference_grids
from clear_dit.attention.layout import Layout
from clear_dit.attention.positions import ExtendedPosEmbed
from clear_dit.attention.radii import Radii
from clear_dit.attention.tracker import Forward, LayerRadii, WindowTracker
from clear_dit.families.table import all_families, family_of, heads_of
from clear_dit.kernels.cells import FAR_LEVELS
from clear_dit.pipelines.parallel.patch_parallel import parallelize

EDITING = [name for name, tiny in FAMILIES.items() if tiny.takes_references]
families = pytest.mark.parametrize("name", few(EDITING, "flux2", "qwen-image"))
# Of unequal sizes; past a diagonal of the second radius 2 reaches nowhere near.
TWO = ((3, 4), (6, 2))


def assert_same(value, other):
    torch.testing.assert_close(value, other, rtol=1e-4, atol=3e-6)


def assert_differs(value, other):
    assert not torch.allclose(value, other, rtol=1e-2, atol=1e-3)


def local(model, **settings):
    apply_clear(model, radius=2, references="local", **settings)
    return model


def check(name, references=TWO, config=None, **inputs):
    """The stock model at a large radius, the oracle at a small one; and dense is something else.

    With far keys, which are the image's alone, and without.
    """
    given = make_inputs(name, 4, 5, references=references, **inputs)
    model = make_model(name, **config or {})
    stock = run(model, given)
    apply_clear(model, radius=FAR, references="local")
    assert_same(run(model, given), stock)
    for far in (False, True):
        found = run(local(model, far=far), given)
        options = {"local_references": True, "config": config, "far": far} | inputs
        oracle = expected(name, 4, 5, 2, references=references, **options)
        assert_same(found, oracle)
        apply_clear(model, radius=2, far=far)
        assert_differs(run(model, given), found)


def test_the_families_are_those_of_the_table():
    having = [f.transformer for f in all_families() if f.reference_grids is not None]
    assert having == [FAMILIES[name].model_class.__name__ for name in EDITING]


@families
@pytest.mark.parametrize("references", [((4, 5),), TWO, ((1, 7), (2, 2), (5, 3))])
def test_references_and_batches(name, references):
    check(name, references, batch=2)


@pytest.mark.parametrize("name", [name for name in EDITING if FAMILIES[name].guided])
def test_guidance(name):
    check(name, config=FAMILIES[name].guided, guidance=True)


@pytest.mark.parametrize("name", [name for name in EDITING if FAMILIES[name].masks_text])
def test_prompts_of_two_lengths(name):
    check(name, batch=3, padded=True)


@families
def test_a_reference_smaller_than_the_radius_is_dense(name):
    given, model = make_inputs(name, 6, 7, references=((2, 2),)), make_model(name)
    apply_clear(model, radius=3)
    dense = run(model, given)
    apply_clear(model, radius=3, references="local")
    assert_same(run(model, given), dense)


@families
def test_from_call_to_call(name):
    model = local(make_model(name), far=False)
    for references in (TWO, ((4, 3), (2, 6)), (), ((3, 4),)):
        found = run(model, make_inputs(name, 4, 6, references=references))
        oracle = expected(name, 4, 6, 2, references=references, local_references=True)
        assert_same(found, oracle)


@families
def test_pooled_keys_are_the_images(name):
    model, given = make_model(name), make_inputs(name, 5, 7, references=TWO)
    reference = run(local(model, down_factor=2, impl="reference"), given)
    assert_same(run(local(model, down_factor=2, impl="tiled"), given), reference)
    assert_differs(run(local(model, far=False), given), reference)


def test_the_bare_processor():
    model, given = make_model("flux"), make_inputs("flux", 4, 6, references=TWO)
    model.set_attn_processor(CLEARProcessor(radius=2, references="local", far=False))
    oracle = expected("flux", 4, 6, 2, references=TWO, local_references=True)
    assert_same(run(model, given), oracle)


@pytest.mark.parametrize("image_first", [False, True])
def test_layouts_of_either_order(image_first):
    """Brought into local attention's order, a sequence has the mask that its window has."""
    text, image = 3, (4, 5)
    layout = Layout(text, *image, 24, image_first, local_references=TWO)
    before = 0 if image_first else text
    images = [(before, *image), (before + 20, *TWO[0]), (before + 32, *TWO[1])]
    mask = local_mask(layout.sequence_length, images, 2)
    places = layout.to_local(torch.arange(len(mask))[None])[0]
    assert torch.equal(mask[places][:, places], layout.window(2, 1).mask())


def test_kontext_pipeline(tiny_pipeline):
    """Tokens are 4 x 4 pixels: a reference of 4 x 6 tokens beside an image of 6 x 10."""
    pipe = tiny_pipeline(FluxKontextPipeline)
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)

    def edit():
        return pipe(
            image=Image.fromarray(pixels),
            prompt="a red house",
            height=24,
            width=40,
            max_area=24 * 40,
            num_inference_steps=2,
            max_sequence_length=6,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            _auto_resize=False,
        ).images

    with dense_masks(local_mask(6 + 60 + 24, [(6, 6, 10), (66, 4, 6)], 2)):
        oracle = edit()
    apply_clear(pipe, radius=2, far=False)
    dense = edit()
    apply_clear(pipe, radius=2, references="local", far=False)
    np.testing.assert_allclose(edit(), oracle, atol=1e-5)
    assert np.abs(dense - oracle).max() > 1e-4


@slow
@pytest.mark.parametrize("far", [False, True])
def test_another_size_compiles_nothing(far):
    """As long as there are as many references."""
    name = "flux"
    model = local(make_model(name), far=far)
    model.transformer_blocks[0].compile(fullgraph=True, dynamic=True, backend="eager")
    for call, (rows, columns, *references) in enumerate(
        [(9, 9, (9, 9), (12, 7)), (9, 12, (9, 10), (7, 13)), (13, 9, (7, 12), (11, 10))]
    ):
        given = make_inputs(name, rows, columns, references=tuple(references))
        with torch.compiler.set_stance("fail_on_recompile" if call else "default"):
            found = run(model, given)
        oracle = expected(
            name, rows, columns, 2, references=tuple(references), local_references=True, far=far
        )
        assert_same(found, oracle)
    torch.compiler.reset()


def test_many_large_references_are_announced():
    tracker = WindowTracker(Radii(8), down_factor=1)
    layout = Layout(512, 512, 512, 8 * 256 * 256, local_references=((256, 256),) * 8)
    layer = LayerRadii((8,))
    with tracker.announced_to_compiled(Forward(layout), "tiled", [layer]):
        assert tracker.compiled(layer) == (layout, layout.window(8, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CLEARProcessor(references="sparse"), "must be dense or local, got 'sparse'"),
        (lambda: CLEARProcessor(references=True), "must be dense or local, got True"),
        (lambda: CLEARProcessor(grid=(4, 6), references="local"), "leave grid out"),
        (lambda: local(make_model("chroma")), r"is for FLUX\.1 .*; Chroma has no reference images"),
        (
            lambda: local(make_model("qwen-image-2.1")),
            r"LongCat-Image .*; Qwen-Image 2\.1 has them within the prompt, .*\. Leave it out",
        ),
        (lambda: local(make_model("z-image")), r"FLUX\.2.*, Qwen-.*; Z-Image has no reference"),
    ],
)
def test_refused_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refused_references():
    model, given = local(make_model("flux")), make_inputs("flux", 4, 6, references=((3, 4),))
    uneven = given["img_ids"].clone()
    uneven[-1, 2] += 1
    with pytest.raises(ValueError, match=r"12 tokens of a reference .* use references='dense'"):
        run(model, given | {"img_ids": uneven})
    apply_clear(model, radius=2)
    run(model, given | {"img_ids": uneven})
    model, given = local(make_model("qwen-image")), make_inputs("qwen-image", 4, 6)
    given |= {
        "hidden_states": torch.randn(1, 24 + 12, 4),
        "img_shapes": [[(1, 4, 6), (2, 2, 3)]],
    }
    with pytest.raises(ValueError, match=r"reference images of one frame, got .*\(2, 2, 3\)"):
        run(model, given)


@families
@pytest.mark.parametrize("far_levels", [0, FAR_LEVELS])
def test_flops_are_the_windows(name, far_levels):
    model = local(make_model(name), impl="tiled", far=far_levels > 0)
    given = make_inputs(name, 4, 6, references=TWO)
    with FlopCounterMode(display=False) as counter:
        run(model, given)
    counts, operators = counter.get_flop_counts()["Global"], torch.ops.clear_dit
    attention = counts[operators.tiled_attention] + counts[operators.dense_attention]
    window = Layout(5, 4, 6, 24, local_references=TWO).window(2, 1, far_levels)
    layers = family_of(model).layers(model)
    alone = sum(layer.startswith("mode_blocks.") for layer in layers)  # FLUX.3's, over the image
    sizes = heads_of(next(iter(layers.values()))), 16
    expected = (len(layers) - alone) * window.attention_flops(*sizes)
    expected += alone * Layout(0, 4, 6).window(2, 1, far_levels).attention_flops(*sizes)
    assert attention == expected
    dense = Layout(5, 4, 6, 24).window(2, 1, far_levels)
    assert window.attended_pairs() < dense.attended_pairs()


@families
def test_training_is_refused(name):
    model, given = local(make_model(name)), make_inputs(name, 4, 6, references=TWO)
    with pytest.raises(ValueError, match=r"no backward pass; .* or references='dense'"):
        model(**given)


def test_two_positions_are_refused():
    model, given = local(make_model("flux")), make_inputs("flux", 4, 6, references=TWO)
    model.pos_embed = ExtendedPosEmbed(10000, (4, 6, 6), "two", (2.0, 2.0))
    with pytest.raises(ValueError, match=r"do not go with two positions .* rope \"yarn\""):
        run(model, given)
    model.pos_embed = ExtendedPosEmbed(10000, (4, 6, 6), "yarn", (2.0, 2.0), 2)
    found = run(model, given)
    model.set_attn_processor(CLEARProcessor(radius=2, references="local"))
    assert_same(run(model, given), found)


def test_patch_parallelism_is_refused():
    model, given = local(make_model("flux")), make_inputs("flux", 4, 6, references=TWO)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        parallelize(model, init_device_mesh("cpu", (2,), mesh_dim_names=("patch",)))
        with pytest.raises(ValueError, match=r"^patch parallel does not share .*='dense'"):
            run(model, given)
    finally:
        dist.destroy_process_group()


def test_grids_of_reference_images():
    def ids(group, rows, columns, top=0, left=0):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        ones = torch.ones_like(y)
        return torch.stack([group * ones, y + top, x + left], dim=-1).reshape(-1, 3).float()

    assert reference_grids(torch.empty(0, 3)) == ()
    one = [ids(1, 3, 4), ids(1, 2, 3), ids(1, 1, 1), ids(1, 1, 1), ids(1, 2, 5)]
    assert reference_grids(torch.cat(one)) == ((3, 4), (2, 3), (1, 1), (1, 1), (2, 5))
    others = [ids(10, 2, 2), ids(20, 3, 2), ids(30, 7, 1), ids(40, 2, 3, top=4, left=5)]
    assert reference_grids(torch.cat(others)) == ((2, 2), (3, 2), (1, 7), (2, 3))
    rounded = ids(1, 2, 400).bfloat16().float()
    assert reference_grids(torch.cat([rounded, rounded])) == ((2, 400), (2, 400))
    # Beside each other in one group, the second one shifted: told apart by nothing.
    with pytest.raises(ValueError, match="18 tokens of a reference image are not in raster order"):
        reference_grids(torch.cat([ids(1, 3, 4), ids(1, 3, 2, left=9)]))
    with pytest.raises(ValueError, match="are not in raster order"):
        reference_grids(ids(1, 1, 40, left=256).bfloat16().float())
