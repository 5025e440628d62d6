"""What PyTorch demands of a custom operator for attention."""

import torch

from clear_dit.kernels.opaque import Geometry
from clear_dit.kernels.pooling import pooled_bias


def check_operator(name, query, key, value, window):
    """Schema, autograd and fake tensors of `clear_dit::{name}_attention` on these inputs."""
    batch, _, key_heads, head_dim = key.shape
    shape = (batch, window.pooled_length, key_heads, head_dim)
    pooled = [torch.randn(shape).to(query.dtype).requires_grad_() for _ in range(2)]
    bias = pooled_bias(window, query.shape[2], None, query.device).clone().requires_grad_()
    operator = getattr(torch.ops.clear_dit, f"{name}_attention").default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        operator, (query, key, value, *pooled, bias, *Geometry.of(window, 0.25)), test_utils=tests
    )
