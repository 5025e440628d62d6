"""FLUX.3: blocks of one kind of tokens, ids in steps of 0.5, norms in float32."""

import pytest
import torch
from support.families.models import make_inputs, make_model, run
from support.families.oracle import FAR, expected
from torch.nn import functional

from clear_dit import apply_clear
from clear_dit.attention.grid import layout_from_ids, unrounded_ids
from clear_dit.attention.layout import Layout
from clear_dit.attention.tracker import Forward
from clear_dit.families.table import family_of


def assert_same(value, other):
    torch.testing.assert_close(value, other, rtol=1e-4, atol=3e-6)


def test_blocks_of_other_tokens_stay():
    (applied,) = apply_clear(make_model("flux3"))
    assert applied.layers == (
        "mode_blocks.image.0.attn",
        "mode_blocks.image.1.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    )
    assert {why: names[0] for why, names in applied.kept.items()} == {
        "attends over reference images alone": "mode_blocks.image_cond.0.attn",
        "attends over text alone": "txt_mode_blocks.0.attn",
    }


@pytest.mark.parametrize("references", [(), ((2, 3),)])
def test_the_image_alone_then_with_all(references):
    model, seen = make_model("flux3"), []
    apply_clear(model, radius=2)
    for attn in family_of(model).layers(model).values():
        attn.processor._local = spy(attn.processor._local, seen)
    run(model, make_inputs("flux3", 4, 6, references=references))
    assert seen == [Layout(0, 4, 6)] * 2 + [Layout(5, 4, 6, 6 if references else 0)] * 2


def spy(attend, seen):
    def look(tensors, layout, *others):
        seen.append(layout)
        return attend(tensors, layout, *others)

    return look


@pytest.mark.parametrize("step", [0.5, 0.25, 1.0, 2.0])
@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (1, 5), (300, 2), (2, 300), (1, 300)])
def test_ids_in_steps_of_any_size(step, rows, columns):
    ids = make_inputs("flux3", rows, columns)["img_ids"] * (2 * step)
    layout = Layout(5, rows, columns)
    txt_ids = torch.zeros(5, 4)
    for dtype in (torch.float32, torch.bfloat16):
        assert layout_from_ids(txt_ids, ids.to(dtype)) == layout
    rounded = unrounded_ids(ids.bfloat16(), layout)
    assert rounded is None if max(rows, columns) <= 256 else torch.equal(rounded, ids)
    assert unrounded_ids(ids, layout) is None
    if rows == 300:
        assert not torch.equal(ids.bfloat16().float(), ids)


def test_a_step_taken_twice_is_no_raster():
    given, model = make_inputs("flux3", 4, 6), make_model("flux3")
    apply_clear(model)
    uneven = given["img_ids"].clone()
    uneven[uneven[:, 2] == 2.5, 2] = 3.0
    with pytest.raises(ValueError, match="are not those of one image in raster order"):
        run(model, given | {"img_ids": uneven})


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_projections(when):
    given, model = make_inputs("flux3", 4, 6, references=((2, 3),)), make_model("flux3")
    if when == "before":
        model.fuse_qkv_projections()
    apply_clear(model, radius=2, far=False)
    if when == "after":
        model.fuse_qkv_projections()
    assert model.single_transformer_blocks[0].attn.fused_projections
    assert_same(run(model, given), expected("flux3", 4, 6, 2, references=((2, 3),)))


def test_flow_maps():
    given = make_inputs("flux3", 4, 6) | {"target_timestep": torch.tensor([0.25])}
    model = make_model("flux3", flow_map=True)
    stock = run(model, given)
    apply_clear(model, radius=FAR)
    assert_same(run(model, given), stock)


def test_half_precision_is_rounded_once():
    """Norm and rotation are in float32, as in the stock layer, which keeps its norms so."""
    model, given = make_model("flux3").to(torch.bfloat16), make_inputs("flux3", 4, 6)
    for block in model.mode_blocks.image:
        block.attn.norm_q.float(), block.attn.norm_k.float()
    attn, seen = model.mode_blocks.image[0].attn, []
    tokens = torch.randn(1, 24, 32, dtype=torch.bfloat16)
    rotary = model.pos_embed(given["img_ids"])

    def attention(query, key, value, **_):
        seen.append((query, key, value))
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", attention)
        attn(tokens, image_rotary_emb=rotary)
    apply_clear(model, radius=2)
    attn.processor._local = lambda tensors, *_: seen.append(tensors) or tensors[2]
    with attn.processor.tracker.under_way(Forward(Layout(0, 4, 6))):
        attn(tokens, image_rotary_emb=rotary)
    stock, ours = seen
    for theirs, mine in zip(stock, ours, strict=True):
        assert torch.equal(theirs.transpose(1, 2), mine)
