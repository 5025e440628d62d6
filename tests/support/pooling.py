"""Problems for the kernels that pool the cells of far keys, and what is exact."""

import torch

from clear_dit.kernels.pooling import pool_cells_by_operators


def problem(height, width, levels, weighted=True, dtype=torch.float32, batch=1, heads=1, dim=24):
    """Arguments of the operator but the scale."""
    generator = torch.Generator().manual_seed(0)
    shape = batch, height * width, heads, dim
    key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(levels if weighted else 0, 2, 2, generator=generator)
    return [key, value, weight, height, width, levels]


def exact(arguments, scale):
    """Keys and values by PyTorch's operators in float64."""
    wide = [x.double() if torch.is_tensor(x) else x for x in arguments]
    return pool_cells_by_operators(*wide, scale)
