"""Changing what CLEAR is on a model: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..attention.processor import LEARNED, CLEARProcessor
from ..families.table import attention_layers
from .forward import STATE, put_under
from .state import ClearState


@contextmanager
def changing(model: nn.Module, weights: bool = False) -> Iterator[ClearState]:
    """Within it nobody else uses a model; an error, or an interruption, leaves it as it was.

    Args:
        weights: whether its weights change too. Those that are to be put back after an error wait
            on the CPU meanwhile.

    Yields:
        The model's state, a new one if it had none.

    Raises:
        RuntimeError: called in the middle of a forward, or of a stage with the original weights.
    """
    is_new = ClearState.on(model) is None
    state = ClearState.attach(model)
    with state.access.exclusive(), ExitStack() as stack:
        if state.originals.are_back:
            raise RuntimeError(
                "CLEAR: a stage of full attention is under way with the original weights; do not "
                "change the model in its callback, but before or after the call."
            )
        before = _Before(model, state)
        if weights:
            stack.enter_context(state.originals.undone_on_error(model))
        try:
            yield state
        except BaseException:
            before.put_back()
            if is_new:
                state.detach(model)
            raise


class _Before:
    """A model's processors, what they learned, its configuration and what CLEAR remembers."""

    def __init__(self, model: nn.Module, state: ClearState) -> None:
        self._model, self._state = model, state
        self._config = model._internal_dict
        self._remembered = {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(state).items()
        }
        layers: list[Any] = list(attention_layers(model).values())
        self._processors = [(attn, attn.processor) for attn in layers]
        self._learned = [
            (processor, name, getattr(processor, name))
            for _, processor in self._processors
            for name in LEARNED
            if isinstance(processor, CLEARProcessor)
        ]
        self._values = [
            None if parameter is None else parameter.detach().clone()
            for *_, parameter in self._learned
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        model: Any = self._model
        for attn, processor in self._processors:
            attn.set_processor(processor)
        for (processor, name, parameter), value in zip(self._learned, self._values, strict=True):
            setattr(processor, name, parameter)
            if parameter is not None:
                parameter.copy_(value)
        vars(self._state).update(self._remembered)
        model._internal_dict = self._config
        if ClearState.on(model) is None:
            setattr(model, STATE, self._state)
            put_under(model)
