"""FSDP's shards in checkpoints: gathered whole when written, dealt out again when read.

PyTorch's and accelerate's own formats for sharded state hold pickles, which this project neither
writes nor reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def gather(state: Any, keep: bool) -> Any:
    """Nested state with every shard replaced by the whole tensor; all processes must call this.

    Args:
        state: as a `state_dict` returns it.
        keep: whether this process wants the tensors, on the CPU; elsewhere they are freed at once.
    """

    def whole(tensor: DTensor) -> torch.Tensor | None:
        full = tensor.full_tensor()
        return full.cpu() if keep else None

    return tree_map_only(DTensor, whole, state)


def deal_out(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor that all have whole; all of it if `like` is no shard."""
    whole = whole.to(like.device)
    if not isinstance(like, DTensor):
        return whole
    # Nobody has to send anything.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


class ShardedOptimizer:
    """An optimizer's state as a part of a checkpoint, by `deal_out`.

    Args:
        optimizer: whose numbers may be shards.
        parameters: in the optimizer's order.
    """

    def __init__(self, optimizer: Any, parameters: Sequence[torch.Tensor]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, numbers in state["state"].items():
            parameter = self.parameters[index]
            for name, value in numbers.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    numbers[name] = deal_out(value, parameter)
        self.optimizer.load_state_dict(state)


class ShardedAverage:
    """A moving average (diffusers' EMAModel) as a part of a checkpoint, by `deal_out`."""

    def __init__(self, average: Any) -> None:
        self.average = average

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pairs = zip(state["shadow_params"], self.average.shadow_params, strict=True)
        dealt = [deal_out(whole, like) for whole, like in pairs]
        self.average.load_state_dict(state | {"shadow_params": dealt})
