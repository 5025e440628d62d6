"""Quantisers of the packages that diffusers knows, and one that leaves buffers alone behind.

diffusers itself asks for a GPU before it quantises with bitsandbytes: layers are replaced here as
it does then, and run by the package's own code for CPUs.
"""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn


def with_torchao(config: str) -> Callable[[nn.Module], None]:
    def quantise(model):
        # It takes seconds to import, and says at warning level which GPU libraries it lacks.
        logging.getLogger("torchao").setLevel(logging.ERROR)
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model, getattr(torchao, config)())

    return quantise


def with_quanto(dtype: str) -> Callable[[nn.Module], None]:
    def quantise(model):
        quanto = pytest.importorskip("optimum.quanto")
        quanto.quantize(model, weights=getattr(quanto, dtype))
        quanto.freeze(model)

    return quantise


def by_layer(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], None]:
    """Replaces every linear layer."""

    def quantise(model):
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        for name in linears:
            model.set_submodule(name, make(model.get_submodule(name)))

    return quantise


def nf4(linear: nn.Linear) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes").nn
    new = bitsandbytes.Linear4bit(
        linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4"
    )
    new.weight = bitsandbytes.Params4bit(
        linear.weight.detach().clone(), requires_grad=False, quant_type="nf4", module=new
    )
    new.bias = linear.bias
    return new.to("cpu")  # quantises


def int8(linear: nn.Linear) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes").nn
    new = bitsandbytes.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    new.weight = bitsandbytes.Int8Params(
        linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False
    )
    new.bias = linear.bias
    return new.to("cpu")


def gguf(linear: nn.Linear) -> nn.Module:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    if linear.in_features % 32:  # llama.cpp keeps such layers as they are
        return linear
    blocks = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), kind))
    new = GGUFLinear(
        linear.in_features, linear.out_features, linear.bias is not None, torch.float32
    )
    new.weight, new.bias = GGUFParameter(blocks, quant_type=kind), linear.bias
    return new


class Packed(nn.Module):
    """As AutoRound's and GPTQ's layers: buffers, and nothing that is called weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("bias", linear.bias if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight * self.scales, self.bias)


QUANTISERS = {
    "torchao int8": with_torchao("Int8WeightOnlyConfig"),
    "torchao float8": with_torchao("Float8WeightOnlyConfig"),
    "bitsandbytes nf4": by_layer(nf4),
    "bitsandbytes int8": by_layer(int8),
    "GGUF": by_layer(gguf),
    "quanto int8": with_quanto("qint8"),
    "quanto float8": with_quanto("qfloat8"),
    "buffers": by_layer(Packed),
}
