"""Quantised linear layers as torchao runs them on a GPU, to count what they take.

Their buffers, products and the tensors between are those of `quantize`'s configurations in torchao
0.18, compiled: rounding reads the tokens and writes them rounded, with their scales; a product of
int8 writes int32, which is scaled and cast in one pass; those of fp8 and nvfp4 write the result.
The numbers are no model's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..families.precision import linears_of
from ..weights.quantise import CHUNK_ROWS, KINDS

# Channels that share a scale in nvfp4, and the tiles its scales are stored in.
BLOCK, TILE_ROWS, TILE_SCALES = 16, 128, 4


def use_narrow_linears(model: nn.Module, kind: str, chunk_rows: int | None = CHUNK_ROWS) -> None:
    """Replace what `quantize` would quantise.

    Args:
        kind: one of KINDS.
        chunk_rows: rows in a product; None for all, which takes fewer operators for the same FLOPs.
    """
    assert kind in KINDS, kind
    linears = linears_of(model)
    for names, make in ((linears.narrow, NARROW[kind]), (linears.stored, STORED[kind])):
        for name in names:
            model.set_submodule(name, make(model.get_submodule(name), chunk_rows))


class _Quantised(nn.Module):
    quantised: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: Any, chunk_rows: int | None) -> None:
        super().__init__()
        weight = linear.weight
        self.bias = linear.bias
        self.chunk_rows: int | None = chunk_rows
        self.out_features: int = int(weight.shape[0])
        self.in_features: int = int(weight.shape[1])
        self._device: torch.device = weight.device
        self.make_buffers()

    def buffer(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device=self._device))

    def make_buffers(self) -> None:
        raise NotImplementedError

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """(1, rows, in) to (1, rows, out)."""
        raise NotImplementedError

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """One chunk stands for all, which take the same one after the other."""
        rows = tokens.flatten(0, -2)[None]
        count, chunk = rows.shape[1], self.chunk_rows
        if chunk is None or count <= chunk:
            out = self.product(rows)
        else:
            out = rows.new_empty(1, count, self.out_features)
            self.product(rows[:, : math.ceil(count / math.ceil(count / chunk))])
        return out.reshape(*tokens.shape[:-1], -1)


class Int8(_Quantised):
    """Int8DynamicActivationInt8WeightConfig, a scale for each row on both sides."""

    def make_buffers(self) -> None:
        self.buffer("quantised", torch.int8, self.out_features, self.in_features)
        self.buffer("scale", torch.float32, self.out_features, 1)
        self.buffer("zero_point", torch.int8, self.out_features, 1)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        rounded, scale = torch.empty_like(rows[0], dtype=torch.int8), _scale_of(rows)
        found = torch._int_mm(rounded, self.quantised.t())
        del rounded, scale
        return found.to(rows.dtype)[None]


class Int8Stored(Int8):
    """Int8WeightOnlyConfig: the weight is cast, the product is scaled."""

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        found = torch.mm(rows[0], self.quantised.t().to(rows.dtype))
        return (found * self.scale.to(rows.dtype).flatten())[None]


class Float8(_Quantised):
    """Float8DynamicActivationFloat8WeightConfig, a scale for each row on both sides."""

    def make_buffers(self) -> None:
        self.buffer("quantised", torch.float8_e4m3fn, self.out_features, self.in_features)
        self.buffer("scale", torch.float32, self.out_features, 1)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        rounded = torch.empty_like(rows[0], dtype=torch.float8_e4m3fn)
        return torch._scaled_mm(
            rounded,
            self.quantised.t(),
            _scale_of(rows),
            self.scale.t(),
            bias=self.bias,
            out_dtype=rows.dtype,
            use_fast_accum=True,
        )[None]


class Float8Stored(Float8):
    """Float8WeightOnlyConfig: the weight is made anew, by way of float32."""

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self.quantised.float() * self.scale
        return F.linear(rows, weight.to(rows.dtype), self.bias)


class Nvfp4(_Quantised):
    """NVFP4DynamicActivationNVFP4WeightConfig: a scale for 16 channels, and one for all."""

    tensor_scale: torch.Tensor

    def make_buffers(self) -> None:
        self.buffer("quantised", torch.uint8, self.out_features, self.in_features // 2)
        scales = blocked(self.out_features, self.in_features // BLOCK)
        self.buffer("scale", torch.float8_e4m3fn, *scales)
        self.buffer("tensor_scale", torch.float32)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        count = rows.shape[1]
        rounded = rows.new_empty(count, self.in_features // 2, dtype=torch.uint8)
        scales = rows.new_empty(
            math.prod(blocked(count, self.in_features // BLOCK)), dtype=torch.float8_e4m3fn
        )
        found = torch._scaled_mm(
            rounded.view(torch.float4_e2m1fn_x2),
            self.quantised.view(torch.float4_e2m1fn_x2).t(),
            scales,
            self.scale.flatten(),
            out_dtype=rows.dtype,
        )
        del rounded, scales
        return (found * self.tensor_scale.to(found.dtype))[None]


def blocked(rows: int, scales: int) -> tuple[int, int]:
    """Shape in which nvfp4's scales are stored, of so many rows and scales in a row."""
    tiles = math.ceil(rows / TILE_ROWS), math.ceil(scales / TILE_SCALES)
    return tiles[0] * TILE_ROWS // TILE_SCALES, tiles[1] * TILE_SCALES * TILE_SCALES


def _scale_of(rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[1], 1, dtype=torch.float32)


NARROW: dict[str, type[_Quantised]] = {"int8": Int8, "fp8": Float8, "nvfp4": Nvfp4}
STORED: dict[str, type[_Quantised]] = {
    "int8": Int8Stored,
    "fp8": Float8Stored,
    "nvfp4": Float8Stored,
}
