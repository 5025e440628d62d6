"""Ranks that share out work whose parts are independent, and exchange what comes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Part = TypeVar("Part")


@dataclass(frozen=True)
class RankGroup:
    """Ranks that take the parts of some work in turn: part n is that of rank n modulo their number.

    Attributes:
        group: of the ranks, which must all do the same calls in the same order; None for this
            process alone. It must carry tensors of the CPU, and of the device that tensors here
            are on.
    """

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This process's, in the group."""
        return 0 if self.group is None else self.group.rank()

    def owner(self, index: int) -> int:
        """The rank whose part it is."""
        return index % self.size

    def share(self, parts: Sequence[Part]) -> Sequence[Part]:
        """This rank's parts."""
        return parts[self.rank :: self.size]

    def in_order(self, values: Sequence[Any], count: int) -> list[Any]:
        """What all ranks made of `count` parts, in the order of the parts.

        Args:
            values: of this rank's `share`; what JSON can hold, which gives numbers back exactly.
        """
        found = self.gather(values)
        return [found[self.owner(index)][index // self.size] for index in range(count)]

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, by rank, as JSON gives it back."""
        if self.group is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), self.group)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, self.group)
        pairs = zip(parts, sizes, strict=True)
        return [json.loads(bytes(part[: int(size)].numpy())) for part, size in pairs]

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """Fill a contiguous tensor on every rank with the owner's."""
        if self.group is not None:
            dist.broadcast(_bytes(tensor), group=self.group, group_src=owner)

    def send(self, tensor: torch.Tensor, to: int) -> dist.Work:
        """Start to send a contiguous tensor; wait for what is returned."""
        work = dist.isend(_bytes(tensor), group=self.group, group_dst=to)
        assert work is not None
        return work

    def receive(self, tensor: torch.Tensor, owner: int) -> None:
        """Fill a contiguous tensor with what its owner sends."""
        dist.recv(_bytes(tensor), group=self.group, group_src=owner)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, in a dtype that every backend carries."""
    return tensor.view(-1).view(torch.uint8)
