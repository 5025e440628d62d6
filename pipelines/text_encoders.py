"""Text encoders and tokenizers that pipelines share: one thread at a time, and as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_of_locks = threading.Lock()


@contextmanager
def encoders_alone(pipe: Any, lora_scale: float | None) -> Iterator[None]:
    """Within it this thread has a pipeline's text encoders and tokenizers, and its LoRAs act so.

    A tokenizer keeps the truncation and padding of its last call, which another thread's replace
    before it is done. Afterwards, or after an error, LoRAs act as before.

    Args:
        pipe: a `FluxPipeline`.
        lora_scale: factor on the strength of the text encoders' LoRAs; None is 1.
    """
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    parts = {id(part): part for part in (*encoders, pipe.tokenizer, pipe.tokenizer_2)}
    with ExitStack() as stack:
        for _, part in sorted(parts.items()):  # in one order: nobody waits for each other
            if part is not None:
                stack.enter_context(_lock_of(part))
        for encoder in {id(one): one for one in encoders if one is not None}.values():
            if lora_scale is not None:
                stack.enter_context(_scaled(encoder, lora_scale))
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
