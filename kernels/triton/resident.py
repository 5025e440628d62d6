"""Tensors that kernels read at every call: made once, kept on their device, safe to replay.

A CUDA graph reads by address what was there when it was captured, as long as it lives. Therefore
lists of tiles are made in no graph's pool, are never made or copied while a graph is captured, and
once a capture has read them they are kept for good.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from .device import capturing, run_apart

Lists = TypeVar("Lists")

# Of all that is kept and no graph reads. The lists of far keys take 64 MB at 8192 px.
MOST_BYTES = 2**30


class Residents:
    """What was made of which arguments, the most recently used last.

    Args:
        most_bytes: of what is kept; the least recently used goes first. What a graph has read is
            not counted.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._replayed: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def get(
        self, make: Callable[..., Lists], arguments: tuple[Hashable, ...], device: torch.device
    ) -> Lists:
        """`make(*arguments)` with its tensors on `device`; the same object as long as it is kept.

        Args:
            make: a pure function; returns a dataclass of CPU tensors, and plain values.

        Raises:
            RuntimeError: it is not there, and a CUDA graph is being captured.
        """
        name = (make, arguments, device)
        in_capture = capturing(device)
        with self._lock:
            found = self._replayed.get(name)
            if found is None:
                found = self._kept.pop(name, None)
                if found is None:
                    if in_capture:
                        raise RuntimeError(
                            "local_attention: a CUDA graph cannot be captured with an image size, "
                            "radius or dtype that has not run before; call once, then capture."
                        )
                    found = _moved(make(*arguments), device)
                if in_capture:
                    self._replayed[name] = found
                else:
                    self._kept[name] = found
                    self._drop()
            return found

    def _drop(self) -> None:
        """Forget the least recently used until what is kept is small enough, but for the last."""
        total = sum(map(_bytes, self._kept.values()))
        while total > self._most_bytes and len(self._kept) > 1:
            total -= _bytes(self._kept.popitem(last=False)[1])

    @property
    def replayed(self) -> int:
        """How many are kept for good."""
        return len(self._replayed)


def _tensors(lists: Any) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(lists, field.name) for field in dataclasses.fields(lists)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _bytes(lists: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(lists).values())


def _moved(lists: Any, device: torch.device) -> Any:
    """The same lists on a device, complete when this returns."""
    if device.type == "cpu":
        return lists
    return run_apart(device, lambda: _copied(lists, device))


def _copied(lists: Any, device: torch.device) -> Any:
    found = {name: torch.empty_like(each, device=device) for name, each in _tensors(lists).items()}
    # What had this memory before may still be read by kernels of any stream.
    torch.cuda.synchronize(device)
    for name, each in _tensors(lists).items():
        found[name].copy_(each)
    torch.cuda.synchronize(device)
    return dataclasses.replace(lists, **found)


_residents = Residents()


def resident(
    make: Callable[..., Lists], arguments: tuple[Hashable, ...], device: torch.device
) -> Lists:
    """`Residents.get` of this process."""
    return _residents.get(make, arguments, device)
