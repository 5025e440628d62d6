"""Models of a true configuration without their weights, and what their tensors would take.

Tensors have a shape and no data: on the meta device, or under FakeTensorMode.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import RequestError, first_line
from ..log_levels import at_level

# Any custom op counts the same FLOPs and returns the same tensors; this one takes all devices.
IMPL = "tiled"


class Memory(NamedTuple):
    """Of a run of a model, in bytes: the weights, and the most that is alive besides them."""

    weights: int
    activations: int


class LiveStorages(TorchDispatchMode):
    """Adds up the storages of the tensors that are alive while it is active.

    Attributes:
        live, peak: bytes, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def add(self, tensors: Iterable[Any]) -> None:
        """Count the tensors whose storage is not counted yet, until they are freed."""
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            address, size = storage._cdata, storage.nbytes()
            if address not in self._known:
                self._known.add(address)
                self.live += size
                weakref.finalize(storage, self._freed, address, size).atexit = False
        self.peak = max(self.peak, self.live)

    def _freed(self, address: int, size: int) -> None:
        self._known.remove(address)
        self.live -= size

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result


def quiet() -> AbstractContextManager[None]:
    """Hide which kernels would run on fake tensors: they say nothing about a real device."""
    return at_level("clear_dit", logging.WARNING)


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Dtype and device of the parameters of models built inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(config: dict[str, Any]) -> Any:
    """A model of diffusers or transformers from its config.json."""
    import diffusers
    import transformers

    try:
        if "_class_name" in config:
            model = getattr(diffusers, config["_class_name"]).from_config(config).eval()
            _keep_in_float32(model)
            return model
        kind = getattr(transformers, config["architectures"][0])
        return kind(kind.config_class.from_dict(config)).eval()
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RequestError(f"--model: cannot be built: {first_line(error)}") from error


def _keep_in_float32(model: nn.Module) -> None:
    """As `from_pretrained` does with some modules of some models, whatever the dtype asked for."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    with LiveStorages() as storages:
        storages.add(model.parameters())
        storages.add(model.buffers())
        return storages.live


def measure(model: nn.Module, run: Callable[[], object]) -> Memory:
    """Memory of one run of a model, without gradients."""
    with LiveStorages() as storages, quiet(), torch.no_grad():
        storages.add(model.parameters())
        storages.add(model.buffers())
        weights = storages.live
        run()
    return Memory(weights, storages.peak - weights)
