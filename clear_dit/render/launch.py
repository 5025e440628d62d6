"""This process among those that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import RequestError


@dataclass(frozen=True)
class Launch:
    """Attributes:
    rank: of this process among all, from 0.
    processes: how many there are.
    local_rank: of this process on its machine, from 0.
    """

    rank: int = 0
    processes: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Launch:
        """What the launcher said (https://docs.pytorch.org/docs/stable/elastic/run.html)."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(name in os.environ for name in names):
            return cls()
        try:
            return cls(*(int(os.environ[name]) for name in names))
        except ValueError as error:
            raise RequestError(f"{', '.join(names)} must be integers ({error}).") from error

    def device(self, asked: str | None) -> str | None:
        """The device of this process: the GPU of its local rank where several could be meant."""
        import torch

        if self.processes == 1 or asked not in (None, "cuda") or not torch.cuda.is_available():
            return asked
        if self.local_rank >= torch.cuda.device_count():
            raise RequestError(
                f"process {self.local_rank} of this machine has no GPU: there are "
                f"{torch.cuda.device_count()}; start as many processes as GPUs."
            )
        return f"cuda:{self.local_rank}"
