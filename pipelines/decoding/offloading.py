"""Running parts of an autoencoder by themselves, where offloading expects it to be called whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.hooks.group_offloading import _get_group_onload_device
from diffusers.hooks.layerwise_casting import _is_layerwise_casting_active
from diffusers.utils.accelerate_utils import apply_forward_hook

_brought: WeakKeyDictionary[Any, _Brought] = WeakKeyDictionary()
_turns: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_bringing = threading.Lock()


@contextmanager
def loaded(vae: Any) -> Iterator[torch.device]:
    """Have an autoencoder on the device it runs on, whoever offloads it.

    Model offload brings it there and takes it away with the next model, as if it had been called;
    sequential offload and leaf-level group offload serve each layer as it is called; what else
    group offload keeps away is brought whole and given back at the end, by the last thread. Where
    layers are cast for each call, threads take turns.

    Yields:
        The device.
    """
    with _turn(vae):
        yield from _loaded(vae)


def _loaded(vae: Any) -> Iterator[torch.device]:
    _as_if_called(vae)
    device = _execution_device(vae)
    with _bringing:
        if vae not in _brought:
            _brought[vae] = _Brought(vae, device)
        brought = _brought[vae]
        brought.users += 1
    try:
        yield device
    finally:
        with _bringing:
            brought.users -= 1
            if not brought.users:
                brought.give_back()
                del _brought[vae]


def _turn(vae: Any) -> AbstractContextManager[Any]:
    if not _is_layerwise_casting_active(vae):
        return nullcontext()
    with _bringing:
        return _turns.setdefault(vae, threading.RLock())


class _Brought:
    """What group offload keeps away of an autoencoder, on its device.

    Attributes:
        users: threads that need it there.
    """

    def __init__(self, vae: Any, device: torch.device) -> None:
        tensors = (*vae.parameters(), *vae.buffers())
        self._away = [(tensor, tensor.data) for tensor in tensors if _is_away(tensor, device)]
        self.users = 0
        try:
            for tensor, data in self._away:
                tensor.data = data.to(device)
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        for tensor, data in self._away:
            tensor.data = data


@apply_forward_hook
def _as_if_called(vae: Any) -> None:
    """Does nothing but what accelerate's hook on a model does before its forward pass."""


def _execution_device(vae: Any) -> torch.device:
    try:
        return _get_group_onload_device(vae)
    except ValueError:
        hooks = (getattr(module, "_hf_hook", None) for module in vae.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((d for d in devices if d is not None), vae.device))


def _is_away(tensor: torch.Tensor, device: torch.device) -> bool:
    # Sequential offload leaves meta tensors, which its hooks fill.
    return tensor.device != device and tensor.device.type != "meta"
