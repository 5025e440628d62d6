"""The node on ComfyUI's other models: by position ids, or by the latent and the prompt."""

import pytest
import torch
from support.comfyui.others import Chroma, NextDiT, QwenImageTransformer2DModel
from support.comfyui.patcher import Model, ModelPatcher
from torch.testing import assert_close

from clear_dit import Window

OVERRIDE = "optimized_attention_override"


@pytest.fixture
def apply(pack):
    return pack.node_attention.apply


def with_masks(patcher, masks):
    """The stock model with a dense mask for every length of sequence named."""
    clone = patcher.clone()

    def override(func, *args, **kwargs):
        q = args[0]
        mask = masks.get(q.shape[2] if kwargs.get("skip_reshape") else q.shape[1])
        if mask is None:
            return func(*args, **kwargs)
        if len(args) > 4:
            args = (*args[:4], mask, *args[5:])
        return func(*args, **kwargs | ({} if len(args) > 4 else {"mask": mask}))

    clone.model_options["transformer_options"][OVERRIDE] = override
    return clone


def z_image_mask(rows, columns, text, padding):
    """Text, image, padding; padding behind the image is seen by all, as text."""
    mask = Window(rows, columns, text + padding, 2).mask()
    order = torch.cat(
        [
            torch.arange(text),
            torch.arange(text + padding, len(mask)),
            torch.arange(text, text + padding),
        ]
    )
    return mask[order][:, order]


SIZES = ((6, 6), (5, 9), (6, 6))


def test_ids_of_flux_2_have_a_fourth_number_and_references_far_away(pack):
    ids = torch.zeros(6 * 5 + 2 * 3, 4)
    ids[:30, 1:3] = torch.cartesian_prod(torch.arange(6.0), torch.arange(5.0))
    ids[30:, 1:3] = torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0))
    ids[30:, 0] = 10
    text = torch.arange(7.0)[:, None] * torch.tensor([0.0, 0.0, 0.0, 1.0])
    given = {"img_ids": ids[None], "txt_ids": text[None], "txt": torch.zeros(1, 7, 8)}
    layout = pack.forward.read_ids(given)
    assert layout == pack.forward.Layout(7, 6, 5, reference_length=6)


@pytest.mark.parametrize("batch", [1, 2])
def test_chroma(apply, batch):
    patcher = ModelPatcher(Model(Chroma()))
    clear = apply(patcher, radius=2, far="off")
    for rows, columns in SIZES:
        inputs = (
            torch.randn(batch, 4, 2 * rows - 1, 2 * columns), torch.ones(batch),
            torch.randn(batch, 7, 32),
        )  # fmt: skip
        mask = Window(rows, columns, 7, 2).mask()
        expected = with_masks(patcher, {7 + rows * columns: mask}).apply(*inputs)
        assert_close(clear.apply(*inputs), expected, atol=1e-5, rtol=1e-5)
        assert (expected - patcher.apply(*inputs)).abs().max() > 1e-3


def test_layers_of_chroma_are_counted_double_blocks_first(apply):
    patcher = ModelPatcher(Model(Chroma()))
    inputs = torch.randn(1, 4, 12, 12), torch.ones(1), torch.randn(1, 7, 32)
    stock = patcher.apply(*inputs)
    assert torch.equal(apply(patcher, 2, "off", 0.0, "0-3").apply(*inputs), stock)
    assert not torch.equal(apply(patcher, 2, "off", 0.0, "0-2").apply(*inputs), stock)


def test_qwen_image_with_padded_prompts(apply):
    patcher = ModelPatcher(Model(QwenImageTransformer2DModel()))
    clear = apply(patcher, radius=2, far="off")
    for rows, columns in SIZES:
        x = torch.randn(2, 4, 1, 2 * rows, 2 * columns)
        text, mask = torch.randn(2, 7, 32), torch.ones(2, 7, dtype=torch.long)
        mask[1, 5:] = 0
        found = clear.apply(x, torch.ones(2), text, mask)
        for row, length in ((0, 7), (1, 5)):
            window = Window(rows, columns, length, 2).mask()
            expected = with_masks(patcher, {length + rows * columns: window}).apply(
                x[row : row + 1], torch.ones(1), text[row : row + 1, :length]
            )
            assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-5)


def test_qwen_image_of_several_layers(apply):
    patcher = ModelPatcher(Model(QwenImageTransformer2DModel()))
    x = torch.randn(1, 4, 3, 8, 8)
    with pytest.raises(ValueError, match="the latent must be one image"):
        apply(patcher).apply(x, torch.ones(1), torch.randn(1, 7, 32))


@pytest.mark.parametrize("size", [(6, 6), (5, 9), (7, 11)])
def test_z_image(apply, size):
    """Blocks and the image's refiner are local, the text's refiner is not."""
    rows, columns = size
    patcher = ModelPatcher(Model(NextDiT()))
    text, padding = 16, -rows * columns % 8
    inputs = torch.randn(2, 4, 2 * rows, 2 * columns), torch.ones(2), torch.randn(2, 11, 32)
    masks = {
        rows * columns + padding: z_image_mask(rows, columns, 0, padding),
        text + rows * columns + padding: z_image_mask(rows, columns, text, padding),
    }
    expected = with_masks(patcher, masks).apply(*inputs)
    found = apply(patcher, radius=2, far="off").apply(*inputs)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    only_blocks = with_masks(patcher, dict(list(masks.items())[1:])).apply(*inputs)
    assert (only_blocks - expected).abs().max() > 1e-4


def test_what_an_earlier_forward_left_in_the_options_is_not_taken_for_this_one_s(apply):
    """Z-Image writes its blocks' numbers into the options it is given."""
    patcher = ModelPatcher(Model(NextDiT()))
    inputs = torch.randn(1, 4, 12, 12), torch.ones(1), torch.randn(1, 11, 32)
    clear = apply(patcher, radius=2, far="off")
    expected = clear.apply(*inputs)
    stale = {"block_type": "double", "block_index": 1, "total_blocks": 2}
    clear.model_options["transformer_options"] |= stale
    assert torch.equal(clear.apply(*inputs), expected)


def test_z_image_whose_text_is_as_long_as_its_image(apply):
    """Refiners cannot be told apart then, and stay full."""
    patcher = ModelPatcher(Model(NextDiT()))
    inputs = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 16, 32)
    masks = {32: z_image_mask(4, 4, 16, 0)}
    found = apply(patcher, radius=2, far="off").apply(*inputs)
    assert_close(found, with_masks(patcher, masks).apply(*inputs), atol=1e-5, rtol=1e-5)


def test_z_image_with_references(apply):
    patcher = ModelPatcher(Model(NextDiT()))
    inputs = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 16, 32)
    with pytest.raises(ValueError, match="Z-Image with reference images is not supported"):
        apply(patcher).apply(*inputs, ref_latents=[inputs[0]])
