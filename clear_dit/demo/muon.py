"""Muon in float32, for CPUs without bfloat16 arithmetic.

`torch.optim.Muon` makes updates orthogonal in bfloat16, which takes twenty times as long there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Without these instructions, bfloat16 takes ten times as long as float32.
FAST_BFLOAT16 = "AVX512" in torch.backends.cpu.get_cpu_capability()
# Keller Jordan's quintic iteration, as in torch.optim.Muon.
_A, _B, _C = 3.4445, -4.775, 2.0315
_ITERATIONS, _MOMENTUM = 5, 0.95


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix [m, n] with singular values of about 1, by Newton-Schulz iterations."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Float32Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with adjust_lr_fn="match_rms_adamw" and no decay, in float32."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - _MOMENTUM)
                update = orthogonalise(gradient.lerp(momentum, _MOMENTUM))
                rate = 0.2 * max(parameter.shape) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * rate)
