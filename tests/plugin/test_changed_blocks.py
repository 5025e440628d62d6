"""Blocks removed, moved, copied, added or wrapped after `apply_clear`.

Expected are models on which it was done before.
"""

import copy

import pytest
import torch
from support.families.models import (
    FAMILIES,
    blocks_of,
    make_inputs,
    make_model,
    prediction,
    run,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

from clear_dit import apply_clear, remove_clear
from clear_dit.families.table import attention_layers

POOLED = {"radius": 2, "down_factor": 2}
LOCAL = {"radius": 2, "far": False}


def remove_first(blocks):
    del blocks[0]


def remove_last(blocks):
    del blocks[-1]


def swap(blocks):
    blocks[0], blocks[1] = blocks[1], blocks[0]


def copy_first(blocks):
    blocks.insert(1, copy.deepcopy(blocks[0]))


def repeat_first(blocks):
    blocks.insert(1, blocks[0])


CHANGES = [remove_first, remove_last, swap, copy_first, repeat_first]


def cases():
    """All of them with one family; one that adds and moves with the others."""
    for name in FAMILIES:
        # Chroma's blocks each have an input of their own: none can be added.
        own = CHANGES if name == "flux" else [swap] if name == "chroma" else [copy_first]
        yield from ((name, change) for change in own)


@pytest.mark.parametrize(("name", "change"), list(cases()))
def test_layers_keep_what_they_learned(name, change):
    given = make_inputs(name, 4, 6)
    stock, plain, model = (make_model(name) for _ in range(3))
    change(blocks_of(stock))
    change(blocks_of(plain))
    full = run(stock, given)
    for each in (model, plain):
        apply_clear(each, **POOLED)
    torch.manual_seed(0)
    for attn in attention_layers(model).values():
        nn.init.normal_(attn.processor.spatial_weight)
    run(model, given)
    change(blocks_of(model))
    with torch.no_grad():
        for key, attn in attention_layers(model).items():
            learned = attention_layers(plain)[key].processor.spatial_weight
            learned.copy_(attn.processor.spatial_weight)
    assert torch.equal(run(model, given), run(plain, given))
    assert remove_clear(model)
    assert torch.equal(run(model, given), full)
    processors = [type(attn.processor) for attn in attention_layers(stock).values()]
    assert [type(attn.processor) for attn in attention_layers(model).values()] == processors


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_new_blocks_without_clear_are_named(name):
    model, given = make_model(name), make_inputs(name, 4, 6)
    apply_clear(model, **LOCAL)
    blocks_of(model).insert(0, copy.deepcopy(blocks_of(make_model(name))[0]))
    layers = len(attention_layers(model))
    with pytest.raises(ValueError, match=rf"\d of {layers} attention layers .*blocks\.0\.attn has"):
        run(model, given)
    apply_clear(model, **LOCAL)
    run(model, given)


class Stranger(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("count", [1, 2])
def test_blocks_in_a_strangers_wrapper_are_named(count):
    model, given = make_model("qwen-image"), make_inputs("qwen-image", 4, 6)
    full = run(model, given)
    apply_clear(model, **LOCAL)
    local, blocks = run(model, given), list(blocks_of(model))
    for index in range(count):
        blocks_of(model)[index] = Stranger(blocks[index])
    for call in (lambda: run(model, given), lambda: remove_clear(model)):
        with pytest.raises(ValueError, match=r"s\.\d\.attn was wrapped .* in a Stranger of "):
            call()
    for index in range(count):
        blocks_of(model)[index] = blocks[index]
    assert torch.equal(run(model, given), local)
    assert remove_clear(model)
    assert torch.equal(run(model, given), full)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", list(CheckpointImpl))
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_blocks_that_pytorch_checkpoints(name, kind, before):
    """As FSDP's do: they run again in the backward pass, when another forward has gone by."""
    tall, wide = make_inputs(name, 8, 4), make_inputs(name, 4, 8)

    def gradients(checkpointed):
        model = make_model(name)
        if not before:
            apply_clear(model, **LOCAL)
        if checkpointed:
            for index, block in enumerate(blocks_of(model)):
                blocks_of(model)[index] = checkpoint_wrapper(block, kind)
        if before:
            apply_clear(model, **LOCAL)
        loss = prediction(model, tall).square().sum()
        if checkpointed:
            prediction(model, wide)
        loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
