"""ComfyUI's torch.compile of the whole model, which checks nothing of `transformer_options`."""

import pytest
import torch
from support.comfyui.from_diffusers import Inputs, pair
from torch.testing import assert_close


def _compiled(patcher):
    """The patcher's clone, and its model compiled as ComfyUI's node does it, for a CPU."""

    def unchecked(guards):
        return ["transformer_options" not in guard.name for guard in guards]

    def backend(graph, inputs, **_):
        return graph.forward

    model = patcher.model.diffusion_model
    compiled = torch.compile(model, backend=backend, options={"guard_filter_fn": unchecked})
    return patcher.clone(), compiled


def _of_compiled(inputs, patcher, compiled, **kwargs):
    before = patcher.model.diffusion_model
    patcher.model.diffusion_model = compiled
    try:
        return inputs.comfyui(patcher, **kwargs)
    finally:
        patcher.model.diffusion_model = before


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_sizes_and_noise_levels_of_a_compiled_model(pack):
    _, patcher = pair()
    clear, compiled = _compiled(
        pack.node_attention.apply(patcher, radius=2, dense_until=0.5, dense_layers="1")
    )
    for rows, columns, level in ((6, 8, 0.9), (6, 8, 0.2), (8, 6, 0.2), (6, 8, 0.9)):
        inputs = Inputs(rows, columns, level=level)
        assert_close(_of_compiled(inputs, clear, compiled), inputs.comfyui(clear))


@torch.no_grad()
def test_two_nodes_of_one_compiled_model(pack):
    _, patcher = pair()
    nodes = [_compiled(pack.node_attention.apply(patcher, radius=r)) for r in (2, 3)]
    inputs = Inputs(6, 8)
    for clear, compiled in (*nodes, *nodes):
        assert_close(_of_compiled(inputs, clear, compiled), inputs.comfyui(clear))
