"""Text encoders and tokenizers that pipelines share: one thread at a time, and as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

PARTS = ("text_encoder", "tokenizer", "processor", "text_processor", "pe", "prompt_upsampler")

_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_of_locks = threading.Lock()


@contextmanager
def encoders_alone(pipe: Any, lora_scale: float | None = None) -> Iterator[None]:
    """Within it this thread has a pipeline's text encoders and tokenizers, and its LoRAs act so.

    A tokenizer keeps the truncation and padding of its last call, which another thread's replace
    before it is done. Afterwards, or after an error, LoRAs act as before.

    Args:
        pipe: of diffusers; its parts whose names begin with one of `PARTS` are meant.
        lora_scale: factor on the strength of the text encoders' LoRAs; None is 1.
    """
    parts = {
        id(part): (name, part)
        for name, part in pipe.components.items()
        if name.startswith(PARTS) and part is not None
    }
    with ExitStack() as stack:
        for _, (_, part) in sorted(parts.items()):  # in one order: nobody waits for each other
            stack.enter_context(_lock_of(part))
        for name, part in parts.values():
            if lora_scale is not None and name.startswith("text_encoder"):
                stack.enter_context(_scaled(part, lora_scale))
        yield


def _lock_of(part: Any) -> Any:
    with _of_locks:
        return _locks.setdefault(part, threading.RLock())


@contextmanager
def _scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """LoRA layers of peft, which keep their strength in `scaling`."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "scale_layer")]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)
