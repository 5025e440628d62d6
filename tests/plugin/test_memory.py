"""What saves memory: gradient checkpointing and offloading, from the CPU to itself or to disk."""

from itertools import product

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxPipeline
from support.models import FAR, assert_differs, assert_same, by_definition, draw, run

from clear_dit import apply_clear, remove_clear
from clear_dit.weights.format import pooling_by_key
from clear_dit.weights.learned import make_far_trainable

CPU = torch.device("cpu")


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def two_forwards(model, tiny_inputs):
    """The second has gone by when checkpointing runs the first again; both have 24 tokens."""
    outputs = [model(**tiny_inputs(*shape)).sample for shape in ((4, 6), (6, 4))]
    (outputs[0].square().sum() + outputs[1].sum()).backward()
    return gradients(model)


@pytest.mark.parametrize("down_factor", [1, 2], ids=["far", "pooled"])
def test_gradient_checkpointing(tiny_transformer, tiny_inputs, down_factor):
    plain, checkpointed = tiny_transformer(), tiny_transformer()
    checkpointed.enable_gradient_checkpointing()
    for model in (plain, checkpointed):
        apply_clear(model, radius=2, down_factor=down_factor)
        if down_factor == 1:
            make_far_trainable(model)
    expected, received = (two_forwards(m, tiny_inputs) for m in (plain, checkpointed))
    assert expected.keys() == received.keys()
    learned = sum(".processor." in name for name in received)
    assert learned == (8 if down_factor == 1 else 4)
    for name, gradient in expected.items():
        torch.testing.assert_close(received[name], gradient)


def test_gradient_checkpointing_is_that_of_full_attention(tiny_transformer, tiny_inputs):
    stock, far = tiny_transformer(), tiny_transformer()
    far.enable_gradient_checkpointing()
    apply_clear(far, radius=FAR)
    expected, received = (two_forwards(m, tiny_inputs) for m in (stock, far))
    assert expected.keys() == received.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(received[name], gradient, rtol=1e-4, atol=1e-4)


def sequential(model, folder):
    cpu_offload(model, execution_device=CPU)


def grouped(model, folder, **options):
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)


def blocks(model, folder):
    grouped(model, folder, offload_type="block_level", num_blocks_per_group=1)


def leaves(model, folder):
    grouped(model, folder, offload_type="leaf_level")


def blocks_on_disk(model, folder):
    # On a CPU only this takes the values out of the parameters between their uses.
    grouped(
        model,
        folder,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
    )


def leaves_on_disk(model, folder):
    grouped(model, folder, offload_type="leaf_level", offload_to_disk_path=str(folder))


WAYS = [sequential, blocks, leaves, blocks_on_disk, leaves_on_disk]


# What was learned of far keys goes with CLEAR.
@pytest.mark.parametrize("offload", WAYS)
@pytest.mark.parametrize(
    ("clear_first", "pooling"),
    [*product((True, False), ("none", "pooled", "far")), (True, "learned")],
)
def test_offloading(tiny_transformer, tiny_inputs, tmp_path, offload, clear_first, pooling):
    model, inputs = tiny_transformer(), tiny_inputs(4, 6)
    settings = {"none": {"far": False}, "pooled": {"down_factor": 2}}.get(pooling, {})
    apply_clear(model, radius=2, **settings)
    if pooling == "learned":
        make_far_trainable(model)
        for weight in pooling_by_key(model).values():
            weight.data.uniform_(0, 0.5)
    expected = run(model, inputs)
    if not clear_first:
        remove_clear(model)
    offload(model, tmp_path)
    if not clear_first:
        apply_clear(model, radius=2, **settings)
    for _ in range(2):
        assert_same(run(model, inputs), expected)


@pytest.mark.parametrize("offload", WAYS)
def test_offloaded_is_full_attention_or_masked(tiny_transformer, tiny_inputs, tmp_path, offload):
    stock, model, inputs = tiny_transformer(), tiny_transformer(), tiny_inputs(4, 6)
    full = run(stock, inputs)
    with by_definition(4, 6, 2, far=True):
        expected = run(stock, inputs)
    assert_differs(expected, full)
    offload(model, tmp_path)
    apply_clear(model, radius=FAR)
    assert_same(run(model, inputs), full)
    apply_clear(model, radius=2)
    assert_same(run(model, inputs), expected)


def test_model_offloading(tiny_pipeline):
    pipe = tiny_pipeline(FluxPipeline)
    full = draw(pipe)
    apply_clear(pipe, radius=2)
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(draw(pipe), expected)
    apply_clear(pipe, radius=FAR)
    np.testing.assert_allclose(draw(pipe), full, rtol=0, atol=1e-5)
