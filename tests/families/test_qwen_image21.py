"""Qwen-Image 2.1: who sees whom, reference images within the prompt, cached keys of the prefix."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21FlexAttnProcessor,
    QwenImage21KVCache,
)
from support.families.models import TEXT_CHANNELS, make_inputs, make_model, prediction, run
from support.families.oracle import FAR, dense_far_keys, dense_masks, local_mask

from clear_dit import apply_clear, remove_clear
from clear_dit.families.qwen_image21 import NEGATIVE, POSITIONS
from clear_dit.pipelines.cascade.resolution import Resolution, applied

NAME = "qwen-image-2.1"
ROWS, COLUMNS = 4, 6
# Places of the prompt that stand for reference images, of 2 x 2 and 2 x 4 tokens.
SLOTS = [False, False, True, False, True, True, False]
REFERENCES = [(1, 2, 2), (1, 2, 4)]
PREFIX = 4 + 4 + 8


def assert_same(value, other):
    torch.testing.assert_close(value, other, rtol=1e-4, atol=3e-6)


def editing_inputs(batch=1, padding=0):
    """A prompt of 4 words with two reference images in it, and an image of 4 x 6 tokens."""
    given = make_inputs(NAME, ROWS, COLUMNS, text=len(SLOTS), batch=batch)
    slots = torch.tensor(SLOTS + [True] * (ROWS * COLUMNS // 4))
    randn = torch.Generator().manual_seed(1)
    given |= {
        "hidden_states": torch.randn(batch, 12 + ROWS * COLUMNS, 4, generator=randn),
        "img_shapes": [[*REFERENCES, (1, ROWS, COLUMNS)]] * batch,
        "img_mask": slots.expand(batch, -1),
    }
    if padding:
        mask = torch.ones(batch, len(SLOTS), dtype=torch.bool)
        mask[1:, len(SLOTS) - padding :] = False
        given["encoder_hidden_states_mask"] = mask
    return given


def oracle(far=False):
    length = PREFIX + ROWS * COLUMNS
    if far:
        whole = torch.ones(length, length, dtype=torch.bool)
        return dense_far_keys(ROWS, COLUMNS, 2, (length, PREFIX, whole))
    return dense_masks(local_mask(length, [(PREFIX, ROWS, COLUMNS)], 2))


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"batch": 2, "padding": 1}])
def test_references_in_the_prompt(options, far):
    given, model = editing_inputs(**options), make_model(NAME)
    stock = run(model, given)
    with oracle(far):
        expected = run(model, given)
    apply_clear(model, radius=FAR, far=far)
    assert_same(run(model, given), stock)
    apply_clear(model, radius=2, far=far)
    assert_same(run(model, given), expected)
    assert not torch.allclose(expected, stock, rtol=1e-2, atol=1e-3)


def test_the_prefix_sees_no_image_and_text_nothing_behind_it():
    model, given = make_model(NAME), editing_inputs()
    apply_clear(model, radius=2)
    before = run(model, given)
    given["hidden_states"][:, 12:] += 1
    after = run(model, given)
    assert torch.equal(after[:, :PREFIX], before[:, :PREFIX])
    assert (after[:, PREFIX:] != before[:, PREFIX:]).any()
    given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
    given["encoder_hidden_states"][:, 3] += 1  # behind two words and a reference image
    last = run(model, given)
    changed = (last != after).any(dim=-1)[0]
    assert changed.tolist() == [False] * 6 + [True] * (len(changed) - 6)


@pytest.mark.parametrize("settings", [{}, {"far": False}, {"down_factor": 2}], ids=str)
@pytest.mark.parametrize("options", [{}, {"batch": 2, "padding": 1}], ids=str)
def test_keys_of_the_prefix_are_kept(settings, options):
    """The first forward fills the cache; the next ones are of the image alone."""
    model, stock, given = make_model(NAME), make_model(NAME), editing_inputs(**options)
    for radius in (FAR, 2):
        apply_clear(model, radius=radius, **settings)
        cache, others = QwenImage21KVCache(2), QwenImage21KVCache(2)
        for step, mode in enumerate(("extract", "cached", "cached")):
            given |= {"timestep": torch.full_like(given["timestep"], 0.5 - step / 10)}
            whole = run(model, given)
            found = run(model, given | {"kv_cache": cache, "kv_cache_mode": mode})
            start = 0 if mode == "extract" else PREFIX
            assert_same(found, whole[:, start:])
            if radius == FAR and "down_factor" not in settings:
                kept = {"kv_cache": others, "kv_cache_mode": mode}
                assert_same(found, run(stock, given | kept))
                for mine, theirs in zip(cache.layer_caches, others.layer_caches, strict=True):
                    assert_same(mine.k, theirs.k)
                    assert_same(mine.v, theirs.v)


@pytest.mark.parametrize("how", [{"radius": 2}, {"radius": 2, "far": False}, None], ids=str)
@pytest.mark.parametrize("options", [{}, {"batch": 2, "padding": 1}], ids=str)
def test_scaled_positions_with_kept_keys(how, options):
    """The prefix has the same position in every table; without apply_clear attention is full."""
    model, given = make_model(NAME), editing_inputs(**options)
    if how is not None:
        apply_clear(model, **how)
    plain, cache = run(model, given), QwenImage21KVCache(2)
    pipe = SimpleNamespace(transformer=model, scheduler=None)
    with applied(pipe, Resolution(rope="two", rope_factors=(3.0, 5.0), trained_side=2)):
        for mode, start in (("extract", 0), ("cached", PREFIX)):
            whole = run(model, given)
            found = run(model, given | {"kv_cache": cache, "kv_cache_mode": mode})
            assert_same(found, whole[:, start:])
            assert torch.equal(whole[:, :PREFIX], plain[:, :PREFIX])
            assert (whole[:, PREFIX:] - plain[:, PREFIX:]).abs().max() > 1e-3


def test_forwards_with_gradients_are_the_same():
    model, given = make_model(NAME), editing_inputs(batch=2, padding=1)
    apply_clear(model, radius=2)
    assert_same(prediction(model, given).detach(), run(model, given))


def test_processors_for_flex_attention():
    model, given = make_model(NAME), editing_inputs()
    layers = [block.attn for block in model.transformer_blocks]
    apply_clear(model, radius=2)
    expected = run(model, given)
    remove_clear(model)
    stock = [QwenImage21FlexAttnProcessor() for _ in layers]
    for attn, processor in zip(layers, stock, strict=True):
        attn.set_processor(processor)
    apply_clear(model, radius=2)
    assert torch.equal(run(model, given), expected)
    remove_clear(model)
    assert [attn.processor for attn in layers] == stock


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([[(1, 4, 6)], [(1, 6, 4)]], r"all images of a batch must have one size, got img_shapes="),
        ([[(2, 2, 6)]] * 2, r"Qwen-Image 2\.1's images have one frame, got 2"),
        (
            [[(1, 4, 8)]] * 2,
            r"means 32 tokens of images, a multiple of 4, but .* has 24",
        ),
        ([[(1, 2, 2), (1, 4, 6)]] * 2, r"means 28 tokens of images, .* hidden_states has 24"),
    ],
)
def test_refused_shapes(shapes, message):
    model, given = make_model(NAME), make_inputs(NAME, ROWS, COLUMNS, batch=2)
    apply_clear(model)
    with pytest.raises(ValueError, match=message):
        run(model, given | {"img_shapes": shapes})


def test_the_table_of_positions():
    """Beyond its ends stock diffusers takes positions from the other one, or fails."""
    model = make_model(NAME)
    table = model.pos_embed.freqs[0]
    assert len(table) == POSITIONS + NEGATIVE
    assert torch.allclose(table[-NEGATIVE].angle(), table[NEGATIVE].conj().angle(), atol=1e-4)
    assert not torch.allclose(
        table[-NEGATIVE - 1].angle(), table[NEGATIVE + 1].conj().angle(), atol=1e-4
    )
    apply_clear(model, radius=2)
    run(model, make_inputs(NAME, 2, 2 * NEGATIVE))
    with pytest.raises(ValueError, match=r"for 2048 tokens a side .* got 2 x 2050 and 5; make"):
        run(model, make_inputs(NAME, 2, 2 * NEGATIVE + 2))
    given = make_inputs(NAME, 2, 2, text=POSITIONS)
    with pytest.raises(ValueError, match=r"and 8191 of text and references .* got 2 x 2 and 8192"):
        run(model, given)
    assert given["encoder_hidden_states"].shape == (1, POSITIONS, TEXT_CHANNELS)
