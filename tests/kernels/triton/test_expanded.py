"""Expanded tensors, whose strides are zero: by pointers, for no tensor descriptor (TMA) reads them.

The interpreter would read them all the same, so here descriptors are made by TMA's rules only.
"""

import pytest
import torch
from support.oracle import attention_by_definition, relative_error
from support.slow import slow
from support.triton_mode import interpreted

from clear_dit.kernels.window import Window

if not interpreted:
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor

from clear_dit.kernels.triton import ops
from clear_dit.kernels.triton.launch import readable_by_descriptor

pytestmark = pytest.mark.usefixtures("poisoned_memory")
WINDOW = Window(5, 9, 3, 3)
SHAPE = (2, WINDOW.sequence_length, 2, 16)


@pytest.fixture
def described(monkeypatch):
    """Hopper's entries, by descriptors where they can; a list of the tensors that were described.

    CUDA driver API, cuTensorMapEncodeTiled: outer strides are positive and multiples of 16 bytes.
    """
    made, from_tensor = [], TensorDescriptor.from_tensor

    def by_the_rules(tensor, block):
        outer = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
        assert all(stride > 0 and stride % 16 == 0 for stride in outer), tensor.stride()
        made.append(tensor)
        return from_tensor(tensor, block)

    monkeypatch.setattr(TensorDescriptor, "from_tensor", by_the_rules)
    monkeypatch.setattr(ops, "table_key", lambda *kind: ("sm_90", 16, 2))
    return made


def results(attention, tensors, grad):
    """Output and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attention(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def by_triton(query, key, value):
    return ops.triton_attention(query, key, value, WINDOW, scale=0.25)[0]


def by_definition(query, key, value):
    return attention_by_definition(query, key, value, WINDOW, 0.25)


# Shape of key and value, and of the gradient, before they are expanded.
CASES = {
    "nothing": (SHAPE, SHAPE),
    "a gradient of one vector": (SHAPE, SHAPE[3:]),
    "the gradient of a sum": (SHAPE, (1,)),  # copied: its channels are not side by side
    "key and value of one head": ((*SHAPE[:2], 1, SHAPE[3]), SHAPE),
    "key and value of one item": ((1, *SHAPE[1:]), SHAPE),
}


@slow
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_definition(described, name):
    generator = torch.Generator().manual_seed(0)
    of_keys, of_grad = CASES[name]
    shapes = SHAPE, of_keys, of_keys, of_grad
    query, key, value, grad = (
        torch.randn(shape, generator=generator).bfloat16().expand(SHAPE) for shape in shapes
    )
    tensors = query, key, value
    found = results(by_triton, tensors, grad)
    exact = results(by_definition, [x.double() for x in tensors], grad)
    plain = results(by_definition, tensors, grad)
    for ours, yardstick, truth in zip(found, plain, exact, strict=True):
        rounding = torch.finfo(torch.bfloat16).eps
        assert relative_error(ours, truth) <= 2 * relative_error(yardstick, truth) + 2 * rounding
    assert described


def test_what_a_descriptor_can_read():
    tokens = torch.zeros(SHAPE, dtype=torch.bfloat16)
    heads_first = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    for readable in (tokens, tokens[:, 3:], tokens[:1], heads_first):
        assert readable_by_descriptor(readable)
    for expanded in (tokens[:1], tokens[:, :1], tokens[:, :, :1]):
        assert not readable_by_descriptor(expanded.expand(SHAPE))
    for unreadable in (tokens[..., :9].contiguous(), tokens[..., 1:], tokens[..., ::2]):
        assert not readable_by_descriptor(unreadable)
