"""Linear layers with 8-bit weights, as torchao computes them, to count what they take.

Their operations and the life of their tensors are those of torchao 0.18's weight-only
configurations, with one float32 scale for each output channel. The numbers are no model's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


def use_eight_bit_linears(model: nn.Module, weights_dtype: str) -> None:
    """Replace every `nn.Linear` of a model; weights_dtype is one of DTYPES."""
    kind = {"int8": Int8Linear, "float8": Float8Linear}[weights_dtype]
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, kind(child, DTYPES[weights_dtype]))


class _EightBitLinear(nn.Module):
    quantised: torch.Tensor  # (out, in)
    scale: torch.Tensor  # (out, 1), float32

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        weight = linear.weight
        self.register_buffer("quantised", torch.empty_like(weight, dtype=dtype))
        self.register_buffer("scale", weight.new_empty(len(weight), 1, dtype=torch.float32))
        self.bias = linear.bias


class Int8Linear(_EightBitLinear):
    """torchao's `Int8WeightOnlyConfig`: the product is scaled, which takes a second output."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        product = torch.mm(tokens.flatten(0, -2), self.quantised.t().to(tokens.dtype))
        out = product * self.scale.to(tokens.dtype).flatten()
        if self.bias is not None:
            out += self.bias
        return out.unflatten(0, tokens.shape[:-1])


class Float8Linear(_EightBitLinear):
    """torchao's `Float8WeightOnlyConfig`: the weight is made anew, by way of float32."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = self.quantised.float() * self.scale
        return F.linear(tokens, weight.to(tokens.dtype), self.bias)
