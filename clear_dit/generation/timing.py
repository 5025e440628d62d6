"""Where the time of a generation goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Timer:
    """Seconds by part of the work."""

    seconds: dict[str, float]

    @contextmanager
    def measure(self, part: str, device: torch.device) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[part] = round(self.seconds.get(part, 0) + time.perf_counter() - start, 3)

    def without(self, whole: str, part: str) -> None:
        """Take a part of the work out of another one that it was in."""
        self.seconds[whole] = round(self.seconds[whole] - self.seconds.get(part, 0), 3)
