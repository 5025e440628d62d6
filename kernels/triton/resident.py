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

from .device import CaptureError, capturing, run_apart

Lists = TypeVar("Lists")
# What made them, of which arguments, on which device.
_Name = tuple[Callable[..., Any], tuple[Hashable, ...], torch.device]

# Of what is kept and no graph reads. The lists of far keys take 64 MB at 8192 px.
MOST_BYTES, MOST_LISTS = 2**30, 256


class Residents:
    """What was made of which arguments, the most recently used last.

    Args:
        most_bytes: of what is kept; the least recently used goes first. What a graph has read is
            not counted.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[_Name, Any] = OrderedDict()
        self._replayed: dict[_Name, Any] = {}
        self._lock = threading.Lock()

    def get(
        self, make: Callable[..., Lists], arguments: tuple[Hashable, ...], device: torch.device
    ) -> Lists:
        """`make(*arguments)` with its tensors on `device`; the same object as long as it is kept.

        Args:
            make: a pure function; returns a dataclass of CPU tensors, and plain values.

        Raises:
            CaptureError: it is not there, and a CUDA graph is being captured.
        """
        name, in_capture = (make, arguments, device), capturing(device)
        with self._lock:
            found = self._found(name, in_capture)
        if found is None:
            if in_capture:
                raise CaptureError
            # Threads that want the same at once make it twice.
            found = run_apart(device, lambda: _on_device(make(*arguments), device))
            with self._lock:
                found = self._kept.setdefault(name, found)
                self._drop()
        return found

    def _found(self, name: _Name, in_capture: bool) -> Any:
        found = self._replayed.get(name)
        if found is None and name in self._kept:
            found = self._kept[name]
            if in_capture:
                self._replayed[name] = self._kept.pop(name)
            else:
                self._kept.move_to_end(name)
        return found

    def _drop(self) -> None:
        """Forget the least recently used until what is kept is little enough, but for the last."""
        sizes = [_bytes(lists) for lists in self._kept.values()]
        total, first = sum(sizes), 0
        while len(sizes) - first > 1 and (
            total > self._most_bytes or len(sizes) - first > MOST_LISTS
        ):
            total -= sizes[first]
            first += 1
        dropped = list(self._kept)[:first]
        for device in {device for *_, device in dropped if device.type == "cuda"}:
            torch.cuda.synchronize(device)  # kernels of any stream may still read them
        for name in dropped:
            del self._kept[name]


def _tensors(lists: Any) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(lists, field.name) for field in dataclasses.fields(lists)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _bytes(lists: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(lists).values())


def _on_device(lists: Any, device: torch.device) -> Any:
    """The same lists on a device, complete when this returns."""
    if device.type == "cpu":
        return lists
    moved = {name: tensor.to(device) for name, tensor in _tensors(lists).items()}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return dataclasses.replace(lists, **moved)


_residents = Residents()


def resident(
    make: Callable[..., Lists], arguments: tuple[Hashable, ...], device: torch.device
) -> Lists:
    """`Residents.get` of this process."""
    return _residents.get(make, arguments, device)
